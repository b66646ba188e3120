"""Reading runs back: curves, the report page, tables, and comparisons over recipes and seeds."""
