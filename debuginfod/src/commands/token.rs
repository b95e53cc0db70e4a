//! `windlassd token`: makes, lists and ends access tokens.

use std::time::{Duration, UNIX_EPOCH};

use clap::Subcommand;
use windlass_debuginfod::administration::Administration;
use windlass_debuginfod::token::{Scope, Token};

use crate::Store;

const DAY_S: u64 = 24 * 3600;

#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token and print it: it is kept nowhere, so this is the only time
    Create {
        #[command(flatten)]
        store: Store,
        /// What the audit log calls its holder; it can never be given again
        name: String,
        /// What it is good for: read, upload:NAMESPACE or admin; may be repeated
        #[arg(long = "scope", value_name = "SCOPE", required = true)]
        scopes: Vec<Scope>,
        /// After how many days it is refused [default: never]
        #[arg(long, value_name = "N")]
        days: Option<u64>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// List all tokens, ended ones too
    List {
        #[command(flatten)]
        store: Store,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// End a token: running services refuse it within five seconds
    Revoke {
        #[command(flatten)]
        store: Store,
        /// Its name
        name: String,
    },
}

pub(crate) fn run(command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create { store, name, scopes, days, json } => {
            let lifetime_s = days.map(|days| days.saturating_mul(DAY_S));
            let administration = Administration::open(&store.config())?;
            let (secret, token) = administration.create_token(&name, scopes, lifetime_s)?;
            if json {
                let mut object = serde_json::to_value(&token)?;
                object["secret"] = secret.reveal().into();
                println!("{object}");
            } else {
                println!("{}", secret.reveal());
            }
        }
        TokenCommand::List { store, json } => {
            let tokens = Administration::open(&store.config())?.tokens()?;
            match json {
                true => println!("{}", serde_json::to_string(&tokens)?),
                false => tokens.iter().for_each(print),
            }
        }
        TokenCommand::Revoke { store, name } => {
            Administration::open(&store.config())?.revoke_token(&name)?;
            eprintln!("revoked {name}; running services refuse it within five seconds");
        }
    }
    Ok(())
}

fn print(token: &Token) {
    let Token { name, scopes, created_s, expires_s, last_used_s, revoked_s } = token;
    let scopes: Vec<_> = scopes.iter().map(ToString::to_string).collect();
    let mut line = format!("{name}: {}; made {}", scopes.join(", "), date(*created_s));
    for (what, time_s) in [("last used", last_used_s), ("expires", expires_s), ("revoked", revoked_s)] {
        if let Some(time_s) = time_s {
            line += &format!("; {what} {}", date(*time_s));
        }
    }
    println!("{line}");
}

/// As HTTP writes it.
pub(crate) fn date(time_s: u64) -> String {
    // HTTP's dates end with the year 9999.
    const LAST_S: u64 = 253_402_300_799;
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(time_s.min(LAST_S)))
}
