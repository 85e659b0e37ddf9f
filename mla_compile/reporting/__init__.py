"""The report as a page: its sections, drawings and templates."""
