//! Stacks copied by perf events and walked in user space: what a user without privileges gets.

use windlass_agent::BackendChoice;
use windlass_tests::skip::may_sample_own_processes;

use crate::live::{assert_complete, assert_expected, profile_workload};

#[tokio::test(flavor = "multi_thread")]
async fn known_stacks_walked_in_user_space() {
    if !may_sample_own_processes("user_mode::known_stacks_walked_in_user_space") {
        return;
    }
    let stacks = profile_workload(|pid| BackendChoice::CopiedStacks { pid }).await;
    assert_expected(&stacks);
    assert_complete(&stacks);
}
