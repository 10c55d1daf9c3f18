"""Reports: HTML pages, and the record that they are drawn from."""
