"""The files that runs write, and the tables, reports and logs that are made from them."""
