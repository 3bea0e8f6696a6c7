"""Tables, statistical tests and HTML pages, made from the folders of runs."""
