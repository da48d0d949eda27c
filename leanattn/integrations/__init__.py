"""Ways into other libraries; what needs another library is imported by name only."""
