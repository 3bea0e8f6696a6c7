"""From runs' folders to what can be read: tables, tests, pages."""
