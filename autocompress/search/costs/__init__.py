"""What a plan costs before it is built, as sums of terms that depend on few parameters each."""
