"""The stable columns and roles of `front.csv`."""

ORIGINAL = "original"
STOCK_INT8 = "stock_int8"
REFERENCES = (ORIGINAL, STOCK_INT8)
ROLES = (*REFERENCES, "candidate", "finalist")
COLUMNS = (
    "candidate", "role", "runtime", "on_front", "metric_search", "metric_test", "drop_test_pp",
    "metric_unit", "latency_ms", "speedup", "speedup_low", "speedup_high", "energy_mj",
    "energy_low_mj", "energy_high_mj", "file_bytes", "download_bytes", "peak_memory_bytes",
    "gpu_memory_bytes", "trusted", "artifact", "plan_hash",
)  # fmt: skip
