"""The filter: its rules, its programs, and what this kernel does with them."""
