//! Device rules as a BPF program, for cgroup v2, which has no devices controller.
//!
//! [`program`] compiles rules to instructions; the worker loads them and attaches them to the
//! container's cgroup. Without it root in a container could make a node of the host's disk.
//!
//! The last rule that matches an access decides; without any the access is denied. Source: the
//! kernel's `Documentation/admin-guide/cgroup-v2.rst`, "Device controller", and the instruction
//! set in `Documentation/bpf/standardization/instruction-set.rst`.

/// Access bits of the kernel (`BPF_DEVCG_ACC_*`).
pub const MKNOD: u8 = 1;
/// See [`MKNOD`].
pub const READ: u8 = 2;
/// See [`MKNOD`].
pub const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// Kinds of device nodes (`BPF_DEVCG_DEV_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Block devices.
    Block = 1,
    /// Character devices.
    Char = 2,
}

/// One rule; an absent field matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Whether a match allows or denies.
    pub is_allowed: bool,
    /// Kind of node.
    pub kind: Option<Kind>,
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// Access bits.
    pub access: u8,
}

/// What containers may do with devices: make any node, use the harmless ones and their terminals.
/// Source: moby `daemon/pkg/oci/defaults.go` and runc `specconv.AllowedDevices`.
pub fn default_rules() -> Vec<Rule> {
    let rule = |kind, major, minor, access| Rule {
        is_allowed: true,
        kind: Some(kind),
        major,
        minor,
        access,
    };
    let mut rules = vec![rule(Kind::Char, None, None, MKNOD), rule(Kind::Block, None, None, MKNOD)];
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(rule(Kind::Char, Some(major), Some(minor), ALL));
    }
    rules.push(rule(Kind::Char, Some(136), None, ALL));
    rules.push(Rule { is_allowed: false, ..rule(Kind::Char, Some(10), Some(229), ALL) });
    rules
}

// Registers: r0 result, r1 context and scratch, r2 kind, r3 access, r4 major, r5 minor.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_CONSTANT: u8 = 0xb7;
const AND_CONSTANT: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_NOT: u8 = 0x55;
const JUMP_IF_NOT_REGISTER: u8 = 0x5d;
const JUMP_IF: u8 = 0x15;
const EXIT: u8 = 0x95;

/// One instruction of the kernel's `struct bpf_insn`, on a little-endian machine.
fn instruction(code: u8, target: u8, source: u8, offset: i16, constant: u32) -> u64 {
    u64::from(code)
        | u64::from(target | source << 4) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(constant) << 32
}

/// The rules as a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`: 1 allows, 0 denies.
pub fn program(rules: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(AND_CONSTANT, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        code.extend(block(rule));
    }
    code.extend([instruction(MOVE_CONSTANT, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    code
}

/// Tests of one rule, each jumping past its end where it fails, then the verdict.
fn block(rule: &Rule) -> Vec<u64> {
    /// A test before its jump distance is known: code, register, other register, constant.
    type Test = (u8, u8, u8, u32);
    let mut steps: Vec<(bool, Test)> = Vec::new();
    if let Some(kind) = rule.kind {
        steps.push((true, (JUMP_IF_NOT, 2, 0, kind as u32)));
    }
    if rule.access != ALL {
        steps.push((false, (MOVE, 1, 3, 0)));
        steps.push((false, (AND_CONSTANT, 1, 0, u32::from(rule.access))));
        // All of the access must be allowed, but any denied part denies it.
        let test =
            if rule.is_allowed { (JUMP_IF_NOT_REGISTER, 1, 3, 0) } else { (JUMP_IF, 1, 0, 0) };
        steps.push((true, test));
    }
    for (register, number) in [(4, rule.major), (5, rule.minor)] {
        if let Some(number) = number {
            steps.push((true, (JUMP_IF_NOT, register, 0, number)));
        }
    }
    let verdict = [
        instruction(MOVE_CONSTANT, 0, 0, 0, u32::from(rule.is_allowed)),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let length = steps.len() + verdict.len();
    let code = steps.into_iter().enumerate().map(|(at, (is_jump, step))| {
        let (code, target, source, constant) = step;
        let distance = if is_jump { length - at - 1 } else { 0 };
        let distance = i16::try_from(distance).expect("a rule has at most ten instructions");
        instruction(code, target, source, distance, constant)
    });
    code.chain(verdict).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `code` as the kernel would.
    fn run(code: &[u64], kind: Kind, access: u8, major: u32, minor: u32) -> bool {
        let context = [u64::from(access) << 16 | kind as u64, u64::from(major), u64::from(minor)];
        let mut registers = [0_u64; 6];
        let mut at = 0;
        loop {
            let word = code[at];
            let target = (word >> 8 & 0xf) as usize;
            let source = (word >> 12 & 0xf) as usize;
            let offset = (word >> 16 & 0xffff) as usize;
            let constant = word >> 32;
            at += 1;
            match (word & 0xff) as u8 {
                LOAD_WORD => registers[target] = context[offset / 4],
                MOVE => registers[target] = registers[source],
                MOVE_CONSTANT => registers[target] = constant,
                AND_CONSTANT => registers[target] &= constant,
                SHIFT_RIGHT => registers[target] >>= constant,
                JUMP_IF_NOT if registers[target] != constant => at += offset,
                JUMP_IF_NOT_REGISTER if registers[target] != registers[source] => at += offset,
                JUMP_IF if registers[target] == constant => at += offset,
                JUMP_IF_NOT | JUMP_IF_NOT_REGISTER | JUMP_IF => {}
                EXIT => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn the_default_rules_allow_what_docker_allows() {
        let code = program(&default_rules());
        for (kind, access, major, minor, expect) in [
            (Kind::Char, READ | WRITE, 1, 3, true),
            (Kind::Char, ALL, 1, 5, true),
            (Kind::Char, READ | WRITE, 5, 2, true),
            (Kind::Char, READ | WRITE, 136, 77, true),
            (Kind::Char, MKNOD, 10, 200, true),
            (Kind::Char, READ, 10, 200, false),
            (Kind::Char, MKNOD, 10, 229, false),
            (Kind::Char, READ, 1, 1, false),
            (Kind::Block, MKNOD, 8, 0, true),
            (Kind::Block, READ, 8, 0, false),
            (Kind::Block, MKNOD | READ, 8, 0, false),
            (Kind::Block, READ, 1, 3, false),
        ] {
            let got = run(&code, kind, access, major, minor);
            assert_eq!(got, expect, "{kind:?} {access} {major}:{minor}");
        }
    }

    #[test]
    fn the_last_matching_rule_decides_and_none_denies() {
        let all = Rule { is_allowed: true, kind: None, major: None, minor: None, access: ALL };
        let no_write = Rule { is_allowed: false, access: WRITE, ..all };
        assert!(!run(&program(&[]), Kind::Char, READ, 1, 3));
        let code = program(&[all, no_write]);
        assert!(run(&code, Kind::Block, READ, 8, 0));
        assert!(!run(&code, Kind::Block, READ | WRITE, 8, 0));
        assert!(run(&program(&[no_write, all]), Kind::Block, WRITE, 8, 0));
    }
}
