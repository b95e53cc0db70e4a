//! Stacks walked in the kernel by the real BPF program.

use windlass_agent::BackendChoice;
use windlass_agent::kernel::Turns;
use windlass_tests::skip::may_use_bpf;

use crate::live::{assert_complete, assert_expected, profile_workload, profile_workload_by};

#[tokio::test(flavor = "multi_thread")]
async fn known_stacks_walked_in_the_kernel() {
    if !may_use_bpf("bpf::known_stacks_walked_in_the_kernel") {
        return;
    }
    let stacks = profile_workload(|_| BackendChoice::Bpf).await;
    assert_expected(&stacks);
    assert_complete(&stacks);
}

/// As kernels before 5.17 do.
#[tokio::test(flavor = "multi_thread")]
async fn known_stacks_walked_in_the_kernel_without_bpf_loop() {
    if !may_use_bpf("bpf::known_stacks_walked_in_the_kernel_without_bpf_loop") {
        return;
    }
    let stacks = profile_workload_by(Turns::WithoutLoop, |_| BackendChoice::Bpf).await;
    assert_expected(&stacks);
    assert_complete(&stacks);
}
