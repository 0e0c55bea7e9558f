"""Device profiles (`hw_profiles/*.yaml`), and the fingerprint that every result carries."""

from autocompress.device.facts import (
    Fingerprint,
    MachineFacts,
    RuntimeFacts,
    cpu_facts,
    local_facts,
    make_fingerprint,
    usable_cores,
)
from autocompress.device.profile import (
    DeviceProfile,
    EnergySettings,
    MeasuringSettings,
    RemoteSettings,
    load_profile,
)
from autocompress.device.runtimes import (
    OnnxRuntimeCpuSettings,
    OnnxRuntimeCudaSettings,
    OpenVinoSettings,
    PyTorchSettings,
    RuntimeSettings,
    TensorRtSettings,
)

__all__ = [
    "DeviceProfile",
    "EnergySettings",
    "Fingerprint",
    "MachineFacts",
    "MeasuringSettings",
    "OnnxRuntimeCpuSettings",
    "OnnxRuntimeCudaSettings",
    "OpenVinoSettings",
    "PyTorchSettings",
    "RemoteSettings",
    "RuntimeFacts",
    "RuntimeSettings",
    "TensorRtSettings",
    "cpu_facts",
    "load_profile",
    "local_facts",
    "make_fingerprint",
    "usable_cores",
]
