"""What some architectures need beyond a row of the table."""
