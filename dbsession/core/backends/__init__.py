"""What differs from database to database: one module each, and the only ones that ask which database it is."""
