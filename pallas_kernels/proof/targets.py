"""The GPUs kernels are compiled for without having one, and the rates of their multiprocessors.

A target describes a device to XLA's compile-only client (a text `GpuTargetConfigProto`), so that a
machine without a GPU compiles for it. The rates are those of one streaming multiprocessor (SM).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One GPU: what the compiler must know of it, and how much an SM does in a clock."""

    name: str
    device_name: str
    compute_capability: int
    num_sms: int
    memory_bytes: int
    memory_bandwidth: int  # bytes per second
    l2_bytes: int
    clock_ghz: float
    mma_flops_per_clock: int  # 16-bit operands, float32 sums, one SM
    exp_per_clock: int = 16
    shared_bytes_per_clock: int = 128
    schedulers: int = 4  # each issues one instruction per clock
    tensor_columns: int = 0  # columns of tensor memory, 0 where there is none
    shared_bytes: int = 232_448  # that one block may use

    @property
    def memory_bytes_per_clock(self) -> float:
        """One SM's part of the memory bandwidth."""
        return self.memory_bandwidth / (self.num_sms * self.clock_ghz * 1e9)

    def description(self) -> str:
        """The text proto that XLA's compile-only client takes as `target_config`."""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: {self.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {self.num_sms}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{
    major: {self.compute_capability}
    feature_extension: ACCELERATED_FEATURES
  }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.device_name}"
"""


B200 = Target(
    name="b200",
    device_name="NVIDIA B200",
    compute_capability=10,
    num_sms=148,
    memory_bytes=191_514_411_008,
    memory_bandwidth=7_672_320_000_000,
    l2_bytes=132_644_864,
    clock_ghz=1.965,
    mma_flops_per_clock=8192,
    tensor_columns=512,
)

H200 = Target(
    name="h200",
    device_name="NVIDIA H200",
    compute_capability=9,
    num_sms=132,
    memory_bytes=151_397_597_184,
    memory_bandwidth=4_800_000_000_000,
    l2_bytes=52_428_800,
    clock_ghz=1.98,
    mma_flops_per_clock=4096,
)

TARGETS = {target.name: target for target in (B200, H200)}
