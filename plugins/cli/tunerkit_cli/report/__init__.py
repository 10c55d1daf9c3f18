"""Reports: rank tables for the terminal and HTML pages (extra ``[cli]``), and plots (extra ``[plot]``)."""
