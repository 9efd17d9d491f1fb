"""To and from other libraries, each imported when it is asked for."""
