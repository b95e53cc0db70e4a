//! Which token does the agent show the service now?
//!
//! One that was given, or the one in a file, which whoever renews it writes anew (a mounted Kubernetes secret, an agent of a
//! secret store). The file is read again when the service does not take what was in it, and not more often than every few
//! seconds: a token that is wrong for good is refused with each request.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Longest time in which a token that was renewed is not seen.
const READ_PAUSE: Duration = Duration::from_secs(2);
/// Most bytes that are read of a file: several times the longest header that servers take.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// The token for the service, if it wants one.
#[derive(Clone, Default)]
pub struct Token {
    file: Option<Arc<Path>>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    value: Option<Arc<str>>,
    read_at: Option<Instant>,
}

/// Without the secret.
impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Token").field("file", &self.file).finish_non_exhaustive()
    }
}

impl From<Option<String>> for Token {
    fn from(value: Option<String>) -> Self {
        let state = State { value: value.map(Arc::from), read_at: None };
        Self { file: None, state: Arc::new(Mutex::new(state)) }
    }
}

impl Token {
    /// The one that is in a file, now and later.
    pub fn in_file(file: PathBuf) -> io::Result<Self> {
        let value = Some(read(&file)?);
        let state = State { value, read_at: None };
        Ok(Self { file: Some(file.into()), state: Arc::new(Mutex::new(state)) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token as it is known.
    pub(crate) fn current(&self) -> Option<Arc<str>> {
        self.lock().value.clone()
    }

    /// Another one than `refused`, if there is one by now.
    pub(crate) async fn renewed(&self, refused: Option<&str>) -> Option<Arc<str>> {
        let file = self.file.clone()?;
        let is_due = {
            let mut state = self.lock();
            let is_due = state.read_at.is_none_or(|read_at| read_at.elapsed() >= READ_PAUSE);
            if is_due {
                state.read_at = Some(Instant::now());
            }
            is_due
        };
        if is_due {
            let path = file.clone();
            match tokio::task::spawn_blocking(move || read(&path))
                .await
                .unwrap_or_else(|error| Err(error.into()))
            {
                Ok(value) => self.lock().value = Some(value),
                // The one that is known may be taken again.
                Err(error) => tracing::debug!(%error, file = %file.display(), "token file cannot be read"),
            }
        }
        self.current().filter(|value| Some(&**value) != refused)
    }
}

/// The token in a file.
fn read(file: &Path) -> io::Result<Arc<str>> {
    let mut text = String::new();
    File::open(file)?.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    match text.trim() {
        // Being written.
        "" => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty")),
        token => Ok(token.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_again_once_in_a_while_and_never_loses_its_token() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token");
        assert!(Token::in_file(path.clone()).is_err(), "there is none");
        std::fs::write(&path, "one\n").expect("room for a token");
        let token = Token::in_file(path.clone()).expect("a token");
        let is = |expect| assert_eq!(token.current().as_deref(), Some(expect));
        is("one");
        std::fs::write(&path, "").expect("room for nothing");
        assert_eq!(token.renewed(Some("one")).await, None, "being written");
        is("one");
        std::fs::write(&path, " two\n").expect("room for a token");
        assert_eq!(token.renewed(Some("one")).await, None, "read just now");
        token.lock().read_at = None;
        assert_eq!(token.renewed(Some("one")).await.as_deref(), Some("two"));
        is("two");
        assert_eq!(
            token.renewed(Some("one")).await.as_deref(),
            Some("two"),
            "another request was refused with the old one"
        );
        assert_eq!(token.renewed(Some("two")).await, None);
        let given = Token::from(Some("three".to_owned()));
        assert_eq!(given.renewed(Some("three")).await, None);
        assert_eq!(given.current().as_deref(), Some("three"));
    }
}
