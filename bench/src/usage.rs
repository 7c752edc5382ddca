//! What processes and the machine have used so far, from /proc.
//!
//! Invariants: times only grow while the threads of a process stay the same; a process that is gone has used nothing.

use std::fs;
use std::path::Path;

/// CPU time and more of one or several threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// On a CPU, in nanoseconds.
    pub cpu_ns: u64,
    /// How often a thread slept or was set aside.
    pub switches: u64,
}

impl Usage {
    /// What was used from `before` to this.
    pub fn since(self, before: Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            switches: self.switches.saturating_sub(before.switches),
        }
    }

    /// Of both.
    pub fn plus(self, other: Usage) -> Usage {
        Usage { cpu_ns: self.cpu_ns + other.cpu_ns, switches: self.switches + other.switches }
    }

    /// All threads of a process, those included that the kernel runs for its io_uring.
    pub fn of_process(process: u32) -> Usage {
        let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else {
            return Usage::default();
        };
        let threads = threads.flatten().map(|thread| Usage::of_task(&thread.path()));
        let usage = threads.fold(Usage::default(), Usage::plus);
        // Coarser, but threads that have ended are in it.
        let whole_ns = ticks_of_process(process) * NS_PER_TICK;
        Usage { cpu_ns: usage.cpu_ns.max(whole_ns), ..usage }
    }

    /// The calling thread.
    pub fn of_this_thread() -> Usage {
        Usage::of_task(Path::new("/proc/thread-self"))
    }

    fn of_task(task: &Path) -> Usage {
        let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
        let status = read("status");
        let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
        let switches = switches.filter_map(|line| line.rsplit('\t').next()?.parse::<u64>().ok());
        Usage { cpu_ns: first_number(&read("schedstat")), switches: switches.sum() }
    }
}

/// CPU time that the whole machine has spent on anything, in clock ticks of 10 ms.
pub fn machine_busy_ticks() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let fields = line.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0));
    let fields: Vec<u64> = fields.take(8).collect();
    // Of user, nice, system, idle, iowait, irq, softirq, steal: all but idle, iowait and steal.
    [0, 1, 2, 5, 6].iter().filter_map(|index| fields.get(*index)).sum()
}

fn ticks_of_process(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name, in brackets, may hold anything; user and system time are the 12th and 13th field after it.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

const NS_PER_TICK: u64 = 10_000_000;
/// Ticks in a second, as the kernel counts them for programs on every common machine.
pub const TICKS_PER_SECOND: f64 = 100.0;

fn first_number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|field| field.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_time() {
        let before = Usage::of_this_thread();
        let mut random = crate::random::Random::new(1);
        let sum = (0..20_000_000_u64).fold(0, |sum: u64, _| sum.wrapping_add(random.next()));
        let used = Usage::of_this_thread().since(before);
        assert!(sum != 0 && used.cpu_ns > 1_000_000, "{used:?}");
        assert!(Usage::of_process(std::process::id()).cpu_ns >= used.cpu_ns);
        assert_eq!(Usage::of_process(u32::MAX), Usage::default());
        assert!(machine_busy_ticks() > 0);
    }
}
