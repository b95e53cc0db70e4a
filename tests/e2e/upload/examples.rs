//! The examples for CI, run as they are printed.

use std::path::Path;
use std::process::Command;

use object::Object as _;
use windlass_tests::program::{checkout, program, run, text, windlass};
use windlass_tests::service::TestService;

use super::Compiler;

/// The shell parts of the examples for CI, as printed.
#[tokio::test(flavor = "multi_thread")]
async fn examples_for_ci_work_as_printed() {
    let test = "upload::examples_for_ci_work_as_printed";
    let service = TestService::start().await;
    let Some(compiler) = Compiler::new(test, &service.folder().join("tree")) else { return };
    if ["bash", "jq"].iter().any(|name| program(test, name).is_none()) {
        return;
    }
    std::fs::rename(compiler.folder.join("twice.c"), compiler.folder.join("program.c")).expect("rename");
    let read = |path: &str| std::fs::read_to_string(checkout().join(path)).expect("an example");
    let gitlab = read("docs/ci/gitlab-ci.yml");
    let docker = read("docs/ci/Dockerfile");
    for (example, commands) in [("GitLab", listed(&gitlab, "  script:")), ("Dockerfile", run_lines(&docker))]
    {
        assert_eq!(commands.len(), 3, "{example}: {commands:?}");
        let shown = text(&mut shell(&service, &compiler.folder, &commands.join("\n")));
        assert!(shown.contains("program (executable"), "{example}: {shown}");
        let left = std::fs::read(compiler.folder.join("program")).expect("the program");
        assert!(
            object::File::parse(&left[..]).expect("an ELF file").section_by_name(".debug_info").is_none()
        );
    }

    let action = read("ci/github-action/action.yml");
    let steps: Vec<_> = action.split("      run: |\n").skip(1).map(block).collect();
    assert_eq!(steps.len(), 2);
    run(Command::new("cc").args(["-g0", "-o", "bare", "program.c"]).current_dir(&compiler.folder), &[0]);
    for (require, code, expect) in
        [("", 0, "uploaded"), ("debug_info", 1, "::error file=bare::bare lacks debug_info")]
    {
        let mut step = shell(&service, &compiler.folder, &steps.concat());
        step.env("INPUT_PATH", "program\n\nbare\n").env("INPUT_REQUIRE", require);
        step.env("INPUT_SOURCES", "true").env("INPUT_ONLY_DEBUG", "false");
        for name in ["GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"] {
            step.env(name, service.folder().join(name));
        }
        let shown = run(step.env("RUNNER_TEMP", service.folder()).env("GITHUB_ACTION_PATH", "."), &[code]);
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains(expect), "{shown}");
    }
    service.stop().await;
}

/// Commands in the shell of a CI job: bash that stops at the first failure, with our programs.
fn shell(service: &TestService, folder: &Path, commands: &str) -> Command {
    let programs = Path::new(windlass("windlass").get_program()).parent().expect("a folder").to_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("bash");
    shell.args(["-e", "-o", "pipefail", "-c", commands]).current_dir(folder);
    shell.env("PATH", format!("{}:{path}", programs.display()));
    shell.env("WINDLASS_SERVER", service.url()).env_remove("WINDLASS_TOKEN");
    shell
}

/// The items of a list in YAML.
fn listed(yaml: &str, key: &str) -> Vec<String> {
    let lines = yaml.lines().skip_while(|line| *line != key).skip(1);
    lines.map_while(|line| line.strip_prefix("    - ")).map(str::to_owned).collect()
}

/// An indented block of YAML.
fn block(rest: &str) -> String {
    let lines = rest.lines().map_while(|line| line.strip_prefix("        "));
    lines.map(|line| format!("{line}\n")).collect()
}

/// What the build stage runs, but for the packages and tools of the image.
fn run_lines(dockerfile: &str) -> Vec<String> {
    let joined = dockerfile.replace("\\\n", "");
    let lines = joined.lines().filter_map(|line| line.strip_prefix("RUN "));
    let commands = lines.map(|line| {
        let words = line.split_whitespace().skip_while(|word| word.starts_with("--"));
        words.collect::<Vec<_>>().join(" ")
    });
    commands.filter(|line| !line.starts_with("apt-get") && !line.starts_with("cargo")).collect()
}
