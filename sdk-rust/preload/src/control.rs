//! Control data: what the program sees of it, and what a reply needs.
