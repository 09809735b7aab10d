"""Tables, pages and explanations: pure functions of records."""
