"""Studies: arms with an equal search for settings, judged on other seeds until every verdict is reached."""
