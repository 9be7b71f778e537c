"""What an author of a method reads: `Delta`, `PeftConfig`, and the roles of modules."""
