"""What a run leaves behind: logged sums, token samples, records for reports and trackers."""
