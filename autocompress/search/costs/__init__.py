"""What a plan costs before it is built: latency, bytes and loss as sums over few parameters each."""
