//! Every dependency's licence must be one that `deny.toml` allows.
//!
//! cargo-deny does this and more, and runs where it is installed; but a check that most contributors
//! skip is found out in CI, so the part that decides what may be shipped needs nothing but cargo.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::checkout::{cargo, command, output, root, run};
use crate::programs::find;

/// Checks the licences of all packages in the lock file.
pub(crate) fn check() -> Result<()> {
    if find("cargo-deny").is_some() {
        run(command("cargo").args(["deny", "--workspace", "check", "licenses", "bans", "sources"]))?;
    }
    let deny = std::fs::read_to_string(root().join("deny.toml")).context("read deny.toml")?;
    let allowed = allowed(&deny)?;
    let metadata = output(&mut cargo("metadata --format-version 1 --locked"))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata")?;
    let packages = metadata["packages"].as_array().context("packages in cargo metadata")?;
    let mut refused = Vec::new();
    for package in packages {
        let expression = package["license"].as_str().unwrap_or("none stated");
        if !Parser::new(expression, &allowed).accepts() {
            let (name, version) = (&package["name"], &package["version"]);
            refused.push(format!("{name} {version}: {expression}"));
        }
    }
    if !refused.is_empty() {
        bail!("deny.toml does not allow the licences of {}", refused.join(", "));
    }
    println!("the licences of {} packages are allowed", packages.len());
    Ok(())
}

/// The list `allow` of the section `[licenses]`.
fn allowed(deny: &str) -> Result<Vec<&str>> {
    let section = deny.split_once("[licenses]").context("deny.toml has no [licenses]")?.1;
    let list = section.split_once("allow = [").context("deny.toml allows no licence")?.1;
    let list = list.split_once(']').context("the allow list of deny.toml has no end")?.0;
    Ok(list.lines().filter_map(|line| line.split('"').nth(1)).collect())
}

/// Evaluates an SPDX expression (with the old `/` for `OR`) while reading it:
/// `any = all (OR all)*`, `all = term (AND term)*`, `term = "(" any ")" | name ["WITH" name]`.
struct Parser<'a> {
    tokens: std::iter::Peekable<std::vec::IntoIter<String>>,
    allowed: &'a [&'a str],
}

impl<'a> Parser<'a> {
    fn new(expression: &str, allowed: &'a [&'a str]) -> Self {
        let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
        let tokens: Vec<_> = spaced.split_whitespace().map(str::to_owned).collect();
        Self { tokens: tokens.into_iter().peekable(), allowed }
    }

    /// Whether the whole text is an expression that the allowed licences satisfy.
    fn accepts(mut self) -> bool {
        self.any().unwrap_or(false) && self.tokens.next().is_none()
    }

    fn any(&mut self) -> Option<bool> {
        let mut accepted = self.all()?;
        while self.tokens.next_if(|token| token == "OR").is_some() {
            accepted |= self.all()?;
        }
        Some(accepted)
    }

    fn all(&mut self) -> Option<bool> {
        let mut accepted = self.term()?;
        while self.tokens.next_if(|token| token == "AND").is_some() {
            accepted &= self.term()?;
        }
        Some(accepted)
    }

    /// Recursion is as deep as the parentheses of a published manifest.
    fn term(&mut self) -> Option<bool> {
        let mut name = self.tokens.next()?;
        if name == "(" {
            let accepted = self.any()?;
            return (self.tokens.next()? == ")").then_some(accepted);
        }
        if self.tokens.next_if(|token| token == "WITH").is_some() {
            name = format!("{name} WITH {}", self.tokens.next()?);
        }
        Some(self.allowed.contains(&name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(expression: &str, expect: bool) {
        let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"];
        assert_eq!(Parser::new(expression, &allowed).accepts(), expect, "{expression}");
    }

    #[test]
    fn expressions() {
        check("MIT", true);
        check("GPL-3.0", false);
        check("GPL-3.0 OR MIT", true);
        check("GPL-3.0/MIT", true);
        check("GPL-3.0 AND MIT", false);
        check("MIT OR GPL-3.0 AND BSL-1.0", true);
        check("(MIT OR GPL-3.0) AND ISC", true);
        check("(MIT OR GPL-3.0) AND BSL-1.0", false);
        check("Apache-2.0 WITH LLVM-exception", true);
        check("Apache-2.0", false);
        check("MIT WITH GCC-exception", false);
        check("none stated", false);
        check("(MIT", false);
        check("MIT OR", false);
        check("", false);
    }

    #[test]
    fn allow_list_of_a_file() {
        let file = "[bans]\n[licenses]\n# why\nallow = [\n  \"MIT\", # widest\n  \"ISC\",\n]\n";
        assert_eq!(allowed(file).unwrap(), ["MIT", "ISC"]);
    }
}
