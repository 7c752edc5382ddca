//! Plays one seed's history from format to a clean stop, and reports which rule broke, if any.
//!
//! ```text
//! load with faults -> calm: all is mended, answered, in step -> probe: clients go on -> both sides equal
//!                  -> clean stop -> stores as left
//! ```
//!
//! Invariants: a seed plays the same history every time, on any thread; a history is told only when somebody listens.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use twinpoint_core::recovery::recover;

use crate::changes::{Changes, Sizes};
use crate::clients::Client;
use crate::disk::DiskSource;
use crate::faults::Faults;
use crate::marks::Marks;
use crate::options::Options;
use crate::panics::catch;
use crate::random::Random;
use crate::story::{Line, Window};
use crate::time::duration_text;
use crate::watch::{Transitions, Watch};
use crate::world::{Counts, Event, Trace, World};

/// The bound of liveness. Within so much virtual time after the last fault every command is answered and the pair is in
/// step; so much later clients' next commands are answered too; and a stop takes no longer.
pub const LIVENESS: Duration = Duration::from_secs(20);
/// Commands of each client after all is mended.
const PROBE_COMMANDS: u64 = 6;
/// More events than any history needs: somebody spins.
const EVENTS_MAX: u64 = 3_000_000;
/// Between two looks at whether a phase is over.
const LOOK_NS: u64 = 5_000_000;

/// What to play.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// Changes to what it draws.
    pub changes: Changes,
    /// One more rule, for tests of the simulator: looks after every event, and says what is broken.
    pub checker: Option<fn(&Counts) -> Option<String>>,
}

/// A history that broke no rule.
#[derive(Clone, Debug)]
pub struct Played {
    /// What happened.
    pub counts: Counts,
    /// Equal for equal histories.
    pub trace_hash: u64,
    /// How long it took, in virtual nanoseconds.
    pub virtual_ns: u64,
    /// From the last fault until all was answered and in step, in virtual nanoseconds.
    pub settled_ns: u64,
    /// What was reached.
    pub marks: Marks,
    /// What CPs did.
    pub points: Transitions,
    /// What sessions did.
    pub sessions: Transitions,
}

/// A history in which a rule was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Play it again with this.
    pub seed: u64,
    /// And with these.
    pub changes: Changes,
    /// Which rule, and where.
    pub text: String,
    /// Where it is checked.
    pub place: String,
    /// What failures of the same rule have in common.
    pub rule: String,
    /// When, in virtual nanoseconds.
    pub virtual_ns: u64,
    /// Of the history until then.
    pub trace_hash: u64,
    /// How much happened until then.
    pub counts: Counts,
    /// How large the history is.
    pub sizes: Sizes,
    /// The last lines of its story, if they were asked for.
    pub story: Vec<String>,
}

impl Failure {
    /// Whether it is the same end of the same history.
    #[must_use]
    pub fn is_same(&self, other: &Failure) -> bool {
        let end = |failure: &Failure| (failure.seed, failure.virtual_ns, failure.trace_hash);
        end(self) == end(other) && self.text == other.text && self.place == other.place
    }

    /// The command that shows the history.
    #[must_use]
    pub fn replay_command(&self) -> String {
        let command = format!("twinpoint-sim --seed {} {}", self.seed, self.changes);
        format!("{} --replay", command.trim_end())
    }
}

/// Plays a history, without a story.
///
/// # Errors
/// The rule that was broken.
pub fn play(plan: &Plan) -> Result<Played, Box<Failure>> {
    play_told(plan, 0, &mut |_| {})
}

/// Plays a history; if a rule breaks, plays it again to tell its last `lines` lines.
///
/// # Errors
/// The rule that was broken.
pub fn play_and_explain(plan: &Plan, lines: usize) -> Result<Played, Box<Failure>> {
    play(plan).map_err(|first| {
        let mut story = VecDeque::new();
        let again = retell(plan, &Window::default(), &mut |line| {
            if story.len() >= lines {
                story.pop_front();
            }
            story.push_back(line.to_owned());
        });
        let is_same = again.as_ref().is_err_and(|again| again.is_same(&first));
        if !is_same {
            story.push_back(format!("PLAYED AGAIN IT ENDS OTHERWISE: {again:?}"));
        }
        Box::new(Failure { story: story.into(), ..*first })
    })
}

/// Plays a history and tells it line by line, as far as the window shows it.
///
/// # Errors
/// The rule that was broken.
pub fn retell(
    plan: &Plan,
    window: &Window,
    tell: &mut dyn FnMut(&str),
) -> Result<Played, Box<Failure>> {
    play_told(plan, usize::MAX, &mut |line| {
        let line = Line::read(line);
        if window.shows(&line) {
            tell(&line.to_string());
        }
    })
}

fn play_told(plan: &Plan, kept: usize, tell: &mut dyn FnMut(&str)) -> Result<Played, Box<Failure>> {
    let trace = Trace { events: Rc::new(RefCell::new(VecDeque::new())), kept };
    let lines = Rc::clone(&trace.events);
    let mut history = History {
        world: begin(plan, trace),
        watch: Watch::default(),
        lines: Rc::clone(&lines),
        tells: kept > 0,
        tell,
        checker: plan.checker,
        settled_ns: 0,
    };
    let played = catch(|| history.play());
    history.tell_lines();
    history.count_marks();
    let History { world, watch, settled_ns, .. } = history;
    let (counts, trace_hash, virtual_ns) = (world.counts, watch.hash(), world.now);
    match played {
        Ok(()) => {
            let Watch { marks, points, sessions, .. } = watch;
            Ok(Played { counts, trace_hash, virtual_ns, settled_ns, marks, points, sessions })
        }
        Err(caught) => Err(Box::new(Failure {
            seed: plan.seed,
            changes: plan.changes.clone(),
            rule: caught.rule(),
            virtual_ns,
            trace_hash,
            counts,
            sizes: Sizes::of(&world.options),
            story: Vec::new(),
            text: caught.text,
            place: caught.place,
        })),
    }
}

/// The world as the seed draws it, with the changes.
fn begin(plan: &Plan, trace: Trace) -> World {
    if plan.changes == Changes::default() {
        return World::new(plan.seed, trace);
    }
    let (mut random, mut faults) = (Random::new(plan.seed), Faults::from_seed(plan.seed));
    let mut options = Options::with_shards(&mut random, plan.changes.shards);
    plan.changes.apply(&mut options, &mut faults);
    World::with_options(options, faults, random, trace)
}

/// A history being played.
struct History<'a> {
    world: World,
    watch: Watch,
    lines: Rc<RefCell<VecDeque<String>>>,
    tells: bool,
    tell: &'a mut dyn FnMut(&str),
    checker: Option<fn(&Counts) -> Option<String>>,
    settled_ns: u64,
}

impl History<'_> {
    fn play(&mut self) {
        let world = &mut self.world;
        let options = format!("{:?}", world.options);
        world.note(|| options);
        world.at(0, Event::Start(0, None));
        if world.options.paired {
            let late_ns = world.random.pick(&[0, 10_000_000, 400_000_000]);
            world.at(late_ns, Event::Start(1, None));
        }
        for client in 0..world.options.clients {
            world.clients.push(Client::default());
            world.soon(1_000_000, Event::Client(client));
        }
        world.soon(1_000_000, Event::Dial(0));
        world.soon(1_500_000, Event::Dial(1));
        world.soon(30_000_000, Event::Fault);
        let load_end = world.now + world.options.load_ns;
        if world.options.loses_secondary {
            let half = world.commands_left / 2;
            self.run_until(load_end, |world| world.commands_left <= half);
            self.world.lose_secondary();
        }
        self.run_until(load_end, |world| world.commands_left == 0 && world.faults_left == 0);
        self.calm_down();
        self.probe();
        self.world.check_equal();
        self.stop();
    }

    /// Steps until `done` or the deadline. Tells which.
    fn run_until(&mut self, deadline: u64, done: impl Fn(&mut World) -> bool) -> bool {
        let mut look = self.world.now;
        while self.world.now < deadline {
            look = (look + LOOK_NS).min(deadline);
            while self.world.step(look) {
                self.look();
            }
            self.world.now = look;
            if done(&mut self.world) {
                return true;
            }
        }
        false
    }

    /// After every event.
    fn look(&mut self) {
        let events = self.world.counts.events;
        assert!(events < EVENTS_MAX, "{EVENTS_MAX} events and no end");
        let fallen = self.watch.look(&self.world);
        for node in fallen {
            self.look_at_fallen(node);
        }
        if self.tells {
            self.tell_lines();
        }
        if let Some(broken) = self.checker.and_then(|checker| checker(&self.world.counts)) {
            panic!("{broken}");
        }
    }

    /// What a start would find on the disk of a node that just died.
    fn look_at_fallen(&mut self, node: usize) {
        let marks = &mut self.watch.marks;
        let Ok(found) = recover(&mut DiskSource(&self.world.nodes[node].disk), None) else {
            return;
        };
        let superblock = &found.coordinator.superblock;
        match (superblock.clean, found.repairs.is_empty()) {
            (true, _) => marks.hit("recovery: clean"),
            (false, true) => marks.hit("recovery: unclean, nothing to repair"),
            (false, false) => {}
        }
        if found.coordinator.committed > superblock.committed {
            marks.hit("recovery: newer than the superblock");
        }
        if found.cut_off.is_some() {
            marks.hit("recovery: record cut off");
        }
        for repair in &found.repairs {
            if repair.why.contains("older of two") {
                marks.hit("recovery: older copy");
            }
        }
    }

    fn tell_lines(&mut self) {
        for line in self.lines.borrow_mut().drain(..) {
            if self.tells {
                (self.tell)(&line);
            }
        }
    }

    /// Marks that the world counts itself.
    fn count_marks(&mut self) {
        let counts = self.world.counts;
        self.watch.marks.add_faults(&counts.faults);
        for (name, times) in [
            ("seen: device failed", counts.device_failures),
            ("seen: promotion", counts.promotions),
            ("seen: no space", counts.no_space),
            ("seen: writers held", counts.holds),
            ("seen: old primary returned", counts.branches),
            ("seen: base given up", counts.broken_pairs),
            ("seen: secondary lost for good", counts.lost_nodes),
            ("seen: lane closed", counts.lanes_closed),
            ("seen: read failed", counts.failed_reads),
            ("recovery: sent back", counts.rewinds + counts.branches),
            ("recovery: refused", counts.damage_refused),
        ] {
            self.watch.marks.add(name, times);
        }
    }

    /// Nothing fails any more: all is mended, and within the bound answered and in step.
    fn calm_down(&mut self) {
        let world = &mut self.world;
        world.is_calm = true;
        world.commands_left = 0;
        world.network_is_up = true;
        for node in 0..2 {
            if let Some(process) = &mut world.nodes[node].process {
                process.is_failing = false;
                if process.has_failed {
                    world.soon(100_000, Event::Kill(node, false));
                }
            }
        }
        for node in 0..world.nodes_used() {
            world.soon(1_000_000, Event::Start(node, None));
        }
        let begun = world.now;
        self.run_until_settled("after the last fault");
        self.settled_ns = self.world.now - begun;
    }

    /// A pair that is in step takes commands again, and gets in step again.
    fn probe(&mut self) {
        if self.world.is_stuck() {
            return;
        }
        let clients = self.world.options.clients;
        self.world.commands_left = PROBE_COMMANDS * clients as u64;
        for client in 0..clients {
            self.world.soon(100_000, Event::Client(client));
        }
        let deadline = self.world.now + bound_ns();
        let sent = self.run_until(deadline, |world| world.commands_left == 0);
        assert!(sent, "clients cannot go on within {}", duration_text(LIVENESS));
        self.run_until_settled("after new commands");
    }

    fn run_until_settled(&mut self, when: &str) {
        let deadline = self.world.now + bound_ns();
        let settled = self.run_until(deadline, World::is_settled);
        if !settled && !self.world.is_stuck() {
            let why = self.world.why_unsettled();
            panic!("{when}, not settled within {}: {why}", duration_text(LIVENESS));
        }
    }

    /// A clean stop leaves a clean store with nothing to repair.
    fn stop(&mut self) {
        if self.world.is_pair_broken {
            return;
        }
        for node in self.world.stop_order() {
            self.world.ask_stop(node);
            let deadline = self.world.now + bound_ns();
            let stopped = self.run_until(deadline, |world| world.process(node).is_stopped);
            assert!(stopped, "node {node} does not stop within {}", duration_text(LIVENESS));
            self.world.check_stopped(node);
        }
        for node in self.world.stop_order() {
            self.look_at_fallen(node);
        }
    }
}

fn bound_ns() -> u64 {
    u64::try_from(LIVENESS.as_nanos()).expect("a short time")
}
