"""Tables, statistical tests and HTML pages that are created from the folders of runs."""
