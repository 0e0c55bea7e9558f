"""Why a model is, or is not, faster than another: pure analysis of runtimes' own profiles."""
