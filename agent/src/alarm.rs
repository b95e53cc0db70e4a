//! What wakes the sampling thread when nothing happens that its backend tells of?
//!
//! That thread waits in one system call for what the kernel has for it, and looks by itself the more seldom the less there is
//! to do: to be woken is most of what an agent costs whose host is quiet. A table that arrived and a stop do not wait for the next
//! look. An eventfd is what a thread can both wait for beside other descriptors and be woken by from any other thread.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// Rings until it is silenced. Clones are the same alarm.
#[derive(Clone, Debug)]
pub struct Alarm(Arc<OwnedFd>);

impl Alarm {
    /// One that does not ring.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the call has no preconditions.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and belongs to nothing else.
        Ok(Self(Arc::new(unsafe { OwnedFd::from_raw_fd(descriptor) })))
    }

    /// Ends the wait of whoever waits for it, or the next one.
    pub fn ring(&self) {
        let one = 1_u64;
        // It fails only when the counter is full (eventfd(2)), and then it rings.
        // SAFETY: the call reads the eight bytes.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
    }

    /// Takes note that it rang.
    pub fn silence(&self) {
        let mut rung = 0_u64;
        // It fails only when it did not ring.
        // SAFETY: the call fills the eight bytes.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut rung).cast(), size_of::<u64>()) };
    }

    /// Can be read while it rings.
    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(alarm: &Alarm, rings: bool) {
        let mut waited = libc::pollfd { fd: alarm.descriptor(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor is there.
        assert_eq!(unsafe { libc::poll(&raw mut waited, 1, 0) }, i32::from(rings));
    }

    #[test]
    fn rings_until_it_is_silenced() {
        let alarm = Alarm::new().unwrap();
        check(&alarm, false);
        alarm.silence();
        alarm.clone().ring();
        alarm.ring();
        check(&alarm, true);
        alarm.silence();
        check(&alarm, false);
    }
}
