"""Statistics of paired runs, such as tests, intervals, stop rules and power. All functions are pure."""
