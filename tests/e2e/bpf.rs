//! Stacks walked in the kernel by the real BPF program.

use windlass_agent::BackendChoice;
use windlass_tests::skip::may_use_bpf;

use crate::live::{assert_complete, assert_expected, profile_workload};

#[tokio::test(flavor = "multi_thread")]
async fn known_stacks_walked_in_the_kernel() {
    if !may_use_bpf("bpf::known_stacks_walked_in_the_kernel") {
        return;
    }
    let stacks = profile_workload(|_| BackendChoice::Bpf).await;
    assert_expected(&stacks);
    assert_complete(&stacks);
}
