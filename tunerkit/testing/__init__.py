"""What authors of methods test their plugins with."""
