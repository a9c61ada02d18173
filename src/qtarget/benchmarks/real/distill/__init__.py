"""`qtarget bench distill --base smollm2`: a real teacher, real text, two students."""
