//! What a container is given, and how it ends.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use skep_common::spec::Base64;
use skep_worker::container::ContainerConfig;
use skep_worker_core::oci::payloads::PayloadFile;
use skep_worker_core::oci::{ContainerInput, ImageConfig, MountInput, Ulimit};

use crate::Test;
use crate::environment::{Environment, block_on, busybox_layer, config, expect_error, shell};

pub(crate) const TESTS: &[Test] = &[
    ("exit_codes_and_signals_are_recorded", || block_on(exit_codes)),
    ("the_process_is_confined_as_in_docker", || block_on(confinement)),
    ("cgroups_cannot_be_written_from_inside", || block_on(read_only_cgroups)),
    ("a_read_only_root_refuses_writes", || block_on(read_only_root)),
    ("thirty_layers_are_stacked_in_order", || block_on(thirty_layers)),
    ("user_directory_and_environment_follow_image_and_service", || block_on(identity)),
    ("files_of_etc_and_host_name_are_ours", || block_on(etc_files)),
    ("sysctls_ulimits_and_mounts_apply", || block_on(settings)),
    ("secrets_are_on_a_tmpfs_and_in_no_file_of_the_host", || block_on(secrets)),
    ("a_terminal_is_logged_as_standard_output", || block_on(terminal)),
    ("open_standard_input_stays_open", || block_on(open_stdin)),
    ("an_init_reaps_orphans_and_passes_signals_on", || block_on(small_init)),
    ("a_program_that_cannot_run_fails_with_a_reason", || block_on(bad_programs)),
    ("stop_asks_then_kills", || block_on(stop)),
    ("ids_are_checked_and_taken_once", || block_on(ids)),
];

async fn exit_codes(env: Environment) {
    for (script, code, signal) in [
        ("exit 0", 0, None),
        ("exit 7", 7, None),
        ("exit 255", 255, None),
        ("sleep 0; true; false", 1, None),
    ] {
        let outcome = env.sh("codes", script).await;
        assert_eq!((outcome.exit.exit_code, outcome.exit.signal), (code, signal), "{script}");
        assert!(!outcome.exit.oom_killed);
    }
    // Process 1 ignores what it has no handler for; from outside SIGKILL always works, and a
    // real-time signal reaches a handler like any other.
    let trap = "trap 'exit 42' TERM; trap 'exit 43' 37; echo up; while :; do sleep 1; done";
    for (number, code, signal) in [(9, 137, Some(9)), (15, 42, None), (37, 43, None)] {
        env.start(&config("signals", shell(trap))).await;
        env.line("signals", "up").await;
        env.runtime.signal("signals", number).await.unwrap();
        let outcome = env.outcome("signals").await;
        assert_eq!((outcome.exit.exit_code, outcome.exit.signal), (code, signal), "{number}");
    }
}

async fn confinement(env: Environment) {
    let outcome = env.sh("status", "exec cat /proc/1/status").await.good();
    let field = |name: &str| {
        let line = outcome.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_default().trim().to_owned()
    };
    assert_eq!(field("Seccomp"), "2");
    assert_eq!(field("NoNewPrivs"), "0");
    assert_eq!(field("SigBlk"), "0000000000000000");
    // Signals 32 and 33 belong to the C library, which lets nobody change them.
    let ignored = u64::from_str_radix(&field("SigIgn"), 16).unwrap();
    assert_eq!(ignored & !0x1_8000_0000, 0, "{ignored:#x}");
    for (set, expect) in [
        ("CapBnd", "00000000a80425fb"),
        ("CapPrm", "00000000a80425fb"),
        ("CapEff", "00000000a80425fb"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
    ] {
        assert_eq!(field(set), expect, "{set}");
    }
    let refused =
        env.sh("refused", "mount -t tmpfs none /tmp; mknod /tmp/d b 8 0; cat /tmp/d").await;
    assert!(refused.stderr().contains("mount: permission denied"), "{refused:?}");
    assert!(refused.stderr().contains("can't open '/tmp/d': Operation not permitted"));
    let masked =
        env.sh("masked", "wc -c < /proc/interrupts; echo 1 > /proc/sys/kernel/panic").await;
    assert_eq!(masked.stdout(), "0\n");
    assert!(masked.stderr().contains("Read-only file system"), "{masked:?}");
    let descriptors = env.sh("descriptors", "ls /proc/1/fd; true").await.good();
    assert_eq!(descriptors.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2"]);
    // The program that made the container cannot be opened for writing through it.
    let exe = env
        .run(
            "exe",
            ContainerInput { init: true, ..shell("echo x > /proc/1/exe; readlink /proc/1/exe") },
        )
        .await;
    assert!(exe.stderr().contains("can't create /proc/1/exe"), "{exe:?}");

    let privileges = ContainerInput { no_new_privileges: true, ..shell("cat /proc/1/status") };
    let outcome = env.run("nnp", privileges).await.good();
    assert!(outcome.contains("NoNewPrivs:\t1") && outcome.contains("Seccomp:\t2"), "{outcome}");
}

async fn read_only_cgroups(env: Environment) {
    let script = "for f in /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/cgroup.procs; do \
        [ -e $f ] && echo 0 > $f && echo WRITTEN; done; mkdir /sys/fs/cgroup/x && echo MADE; \
        ls /sys/fs/cgroup | head -n 3 | wc -l";
    let outcome = env.sh("cgroups", script).await;
    assert_eq!(outcome.stdout(), "3\n", "{outcome:?}");
    assert!(outcome.stderr().contains("Read-only file system"));
}

async fn read_only_root(env: Environment) {
    let script = "touch /x; touch /dev/shm/y && echo shm; echo z > /etc/hosts; cat /etc/hosts";
    let container = ContainerInput { read_only: true, ..shell(script) };
    let outcome = env.run("ro", container).await;
    assert_eq!(outcome.stdout(), "shm\n127.0.0.1 localhost\n");
    assert_eq!(outcome.stderr().matches("Read-only file system").count(), 2, "{outcome:?}");

    let writable =
        env.sh("rw", "echo z > /x && cat /x && mount | grep -c ' / type overlay (rw'").await;
    assert_eq!(writable.good(), "z\n1\n");
}

async fn thirty_layers(env: Environment) {
    let mut config = config("layers", shell("cat /marks/* && cat /last && ls /marks | wc -l"));
    for number in 0..30 {
        // Names that mount options would split.
        let layer = env.base.join(format!("layer:{number},{}", "long".repeat(30)));
        fs::create_dir_all(layer.join("marks")).unwrap();
        fs::write(layer.join("marks").join(format!("{number:02}")), format!("{number}\n")).unwrap();
        fs::write(layer.join("last"), format!("last {number}\n")).unwrap();
        config.layers.push(layer);
    }
    let expect: String = (0..30).map(|number| format!("{number}\n")).collect();
    let outcome = env.run_config(&config).await;
    assert_eq!(outcome.good(), format!("{expect}last 29\n30\n"));
}

async fn identity(env: Environment) {
    let image = ImageConfig {
        entrypoint: Some(vec!["/bin/sh".into(), "-c".into()]),
        cmd: Some(vec!["id; pwd; env".into()]),
        env: Some(vec!["A=1".into(), "B=2".into()]),
        user: "web".into(),
        working_dir: "/made/by us".into(),
        ..ImageConfig::default()
    };
    let container = ContainerInput {
        env: vec!["B=3".into()],
        groups: vec!["44".into(), "1234".into()],
        ..ContainerInput::default()
    };
    let mut config = config("0123456789abcdef", container);
    config.image = image;
    let outcome = env.run_config(&config).await.good();
    let expect = "uid=33(web) gid=33(web) groups=33(web),44(audit),1234\n/made/by us\n";
    assert!(outcome.starts_with(expect), "{outcome}");
    for variable in ["A=1", "B=3", "HOSTNAME=0123456789ab", "HOME=/srv"] {
        assert!(outcome.lines().any(|line| line == variable), "{variable}: {outcome}");
    }
    assert!(!outcome.contains("CARGO"), "the daemon's environment leaks: {outcome}");

    config.id = "override".into();
    config.container.user = Some("1000:audit".into());
    config.container.args = vec!["id -u; id -g; id -G; echo $HOME".into()];
    config.container.groups.clear();
    assert_eq!(env.run_config(&config).await.good(), "1000\n44\n44\n/\n");
}

async fn etc_files(env: Environment) {
    let script = "cat /etc/hosts /etc/resolv.conf /etc/hostname; hostname; echo x >> /etc/hosts";
    let container = ContainerInput { hostname: Some("web-1".into()), ..shell(script) };
    let expect = "127.0.0.1 localhost\nnameserver 127.0.0.11\nweb-1\nweb-1\n";
    assert_eq!(env.run("etc", container).await.good(), expect);

    // A link in the image that leads out of it must not be followed on the host.
    let layer = env.base.join("links");
    fs::create_dir_all(layer.join("etc")).unwrap();
    let victim = env.base.join("victim");
    fs::write(&victim, "untouched").unwrap();
    for name in ["hosts", "passwd"] {
        symlink(&victim, layer.join("etc").join(name)).unwrap();
    }
    let mut linked = config("links", shell("cat /etc/resolv.conf; id -u"));
    linked.layers.push(layer);
    linked.container.user = Some("0".into());
    assert_eq!(env.run_config(&linked).await.good(), "nameserver 127.0.0.11\n0\n");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
}

async fn settings(env: Environment) {
    fs::write(env.base.join("shared"), "from the host\n").unwrap();
    let script = "cat /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/ping_group_range; \
        ulimit -n; cat /in/file; cat /proc/self/oom_score_adj; mount | grep -c 'shm.*size=1024k'";
    let container = ContainerInput {
        sysctls: [("net.core.somaxconn".to_owned(), "77".to_owned())].into(),
        ulimits: vec![Ulimit { name: "nofile".into(), soft: 321, hard: 400 }],
        oom_score_adj: Some(123),
        shm_bytes: Some(1 << 20),
        mounts: vec![MountInput {
            target: "/in/file".into(),
            kind: "bind".into(),
            source: env.base.join("shared"),
            options: vec!["bind".into(), "ro".into()],
        }],
        ..shell(script)
    };
    let outcome = env.run("settings", container).await.good();
    assert_eq!(outcome, "77\n0\t2147483647\n321\nfrom the host\n123\n1\n");
}

async fn secrets(env: Environment) {
    let file = |target: &str, (uid, mode): (u32, u32), data: &[u8]| PayloadFile {
        target: target.into(),
        uid,
        gid: uid,
        mode,
        data: Base64(data.to_vec()),
    };
    let hidden = b"hush-7f3a\n";
    let payloads = vec![
        file("/run/secrets/key", (0, 0o444), hidden),
        file("/run/secrets/deep/own", (1000, 0o400), b"own\n"),
        file("/etc/app/page", (0, 0o640), b"page\n"),
        file("/etc/hostname.d", (0, 0o444), &[b'x'; 300_000]),
    ];
    let script = "cat /run/secrets/key /run/secrets/deep/own /etc/app/page; wc -c < /etc/hostname.d; \
        stat -c '%u %g %a' /run/secrets/key /run/secrets/deep/own /etc/app/page; \
        grep -c ' /run/secrets tmpfs ro,' /proc/mounts; \
        echo x > /run/secrets/key; rm /run/secrets/key; echo x > /etc/app/page; \
        trap 'exit 0' TERM; echo up; while :; do sleep 1; done";
    let config = ContainerConfig { payloads, ..config("secrets", shell(script)) };
    env.start(&config).await;
    env.line("secrets", "up").await;
    // Neither the shim's configuration nor the container's layer has them.
    let found = std::process::Command::new("grep")
        .args(["-r", "-l", "hush-7f3a"])
        .args([env.run_dir("secrets"), env.data_dir("secrets")])
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    let found: Vec<&str> = found.lines().filter(|path| !path.contains("/log")).collect();
    assert_eq!(found, [""; 0]);
    let base64 = std::process::Command::new("grep")
        .args(["-r", "-l", "aHVzaC03ZjNhCg"])
        .args([env.run_dir("secrets"), env.data_dir("secrets")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(base64.stdout).unwrap(), "");
    assert!(!fs::read_to_string("/proc/mounts").unwrap().contains("/payloads"), "the host sees it");
    env.runtime.stop("secrets", 15, Duration::from_secs(30)).await.unwrap();
    let outcome = env.outcome("secrets").await;
    assert_eq!(
        outcome.good(),
        "hush-7f3a\nown\npage\n300000\n0 0 444\n1000 1000 400\n0 0 640\n1\nup\n"
    );
    assert_eq!(outcome.stderr().matches("Read-only file system").count(), 3, "{outcome:?}");
    let again = ContainerConfig { payloads: Vec::new(), ..config };
    env.start(&again).await;
    env.line("secrets", "up").await;
    env.runtime.stop("secrets", 15, Duration::from_secs(30)).await.unwrap();
    assert!(env.outcome("secrets").await.stderr().contains("No such file"), "nothing is left");
}

async fn terminal(env: Environment) {
    let container = ContainerInput { tty: true, ..shell("echo $TERM; [ -t 1 ] && echo tty >&2") };
    let outcome = env.run("tty", container).await;
    assert_eq!(outcome.good(), "xterm\r\ntty\r\n");
    assert_eq!(outcome.stderr(), "");
}

async fn open_stdin(env: Environment) {
    assert_eq!(env.sh("closed", "cat; echo end").await.good(), "end\n");
    let container = ContainerInput { open_stdin: true, ..shell("echo up; cat; echo end") };
    env.start(&config("open", container)).await;
    env.line("open", "up").await;
    let exit = env.runtime.stop("open", 9, Duration::from_secs(30)).await.unwrap();
    assert_eq!(exit.exit_code, 137);
    assert_eq!(env.records("open").await.len(), 1, "cat waits for ever");
}

async fn small_init(env: Environment) {
    // The orphan ends at once; without an init it would stay a zombie of the shell.
    let script = "sh -c 'true & exec true'; trap 'echo got; exit 9' TERM; \
        (setsid sh -c 'sleep 0 & exec sleep 0') ; echo $$; while :; do sleep 1; done";
    let container = ContainerInput { init: true, ..shell(script) };
    env.start(&config("init", container)).await;
    env.line("init", "2").await;
    let exit = env.runtime.stop("init", 15, Duration::from_secs(30)).await.unwrap();
    assert_eq!(exit.exit_code, 9);
    assert_eq!(env.outcome("init").await.stdout(), "2\ngot\n");

    let killed = ContainerInput { init: true, ..shell("kill -9 $$") };
    assert_eq!(env.run("killed", killed).await.exit.exit_code, 137);
}

async fn bad_programs(env: Environment) {
    let program = |path: &str| ContainerInput { command: vec![path.into()], ..Default::default() };
    let created = env.runtime.create(&config("missing", program("/no/such"))).await;
    expect_error(created, "executable '/no/such' not found");
    assert!(!env.run_dir("missing").exists() && !env.data_dir("missing").exists());
    assert!(!env.cgroup("missing").exists());

    let ghost = ContainerInput { user: Some("ghost".into()), ..shell("true") };
    let created = env.runtime.create(&config("user", ghost)).await;
    expect_error(created, "unable to find user ghost");
    expect_error(env.runtime.create(&config("none", program(""))).await, "no command specified");
    let absent = MountInput {
        target: "/data".into(),
        kind: "bind".into(),
        source: env.base.join("absent"),
        options: vec!["rbind".into()],
    };
    let unmountable = ContainerInput { mounts: vec![absent], ..shell("true") };
    let created = env.runtime.create(&config("mount", unmountable)).await;
    expect_error(created, "/absent");

    // It is there and executable, but no program: only the kernel can tell.
    let layer = env.base.join("layer");
    fs::create_dir_all(&layer).unwrap();
    fs::copy(busybox_layer().join("etc/passwd"), layer.join("text")).unwrap();
    std::os::unix::fs::chown(layer.join("text"), Some(0), Some(0)).unwrap();
    fs::set_permissions(layer.join("text"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let mut text = config("text", program("/text"));
    text.layers.push(layer);
    env.runtime.create(&text).await.unwrap();
    expect_error(env.runtime.start("text").await, "exec /text: Exec format error");
    assert_eq!(env.outcome("text").await.exit.exit_code, 126);
}

async fn stop(env: Environment) {
    let deaf = "trap 'echo deaf' TERM; echo up; (sleep 1000; echo never) & while :; do wait; done";
    env.start(&config("deaf", shell(deaf))).await;
    env.line("deaf", "up").await;
    let exit = env.runtime.stop("deaf", 15, Duration::from_millis(300)).await.unwrap();
    assert_eq!((exit.exit_code, exit.signal), (137, Some(9)));
    assert_eq!(env.outcome("deaf").await.stdout(), "up\ndeaf\n");

    env.runtime.create(&config("waiting", shell("true"))).await.unwrap();
    expect_error(env.runtime.signal("waiting", 15).await, "not started");
    let exit = env.runtime.stop("waiting", 15, Duration::from_secs(30)).await.unwrap();
    assert_eq!(exit.exit_code, 137);
    assert!(!env.run_dir("waiting").exists() && !env.data_dir("waiting").exists());
    env.runtime.remove("waiting").await.unwrap();

    let pid = env.start(&config("running", shell("while :; do sleep 100; done"))).await;
    env.runtime.remove("running").await.unwrap();
    assert!(!crate::environment::is_running(pid) && !env.run_dir("running").exists());
    assert!(!env.cgroup("running").exists());
    env.runtime.remove("running").await.expect("removing what is gone is no error");
}

async fn ids(env: Environment) {
    for id in ["", ".", "..", "a/b", "a b", ".hidden", &"x".repeat(65)] {
        expect_error(env.runtime.create(&config(id, shell("true"))).await, "invalid container id");
    }
    env.start(&config("twice", shell("sleep 1000"))).await;
    expect_error(env.runtime.create(&config("twice", shell("true"))).await, "exists already");
    expect_error(env.runtime.start("twice").await, "not waiting to start");
    env.runtime.remove("twice").await.unwrap();
    expect_error(env.runtime.wait("twice").await, "not found");
    expect_error(env.runtime.start("other").await, "not found");
}
