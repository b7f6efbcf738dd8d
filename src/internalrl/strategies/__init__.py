"""Named strategies and limits on codes."""
