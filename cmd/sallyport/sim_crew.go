package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/cli"
	"sallyport/internal/simnode"
)

// crew is the worker processes of a simulation.
type crew struct {
	program string
	workers []*simWorker
	changed chan struct{} // holds a wake-up: a report came

	mu       sync.Mutex
	arrivals map[string][]int64 // unix nanoseconds, by the digest of a policy
	problem  string
}

// simWorker is one place for a process: chaos kills one and starts the next.
type simWorker struct {
	c   *crew
	cfg simnode.Config

	mu     sync.Mutex
	cmd    *exec.Cmd
	in     io.WriteCloser
	last   simnode.Report // of the process that runs
	before simnode.Report // sums of those before it
	spools chan []simnode.SpoolState
	rate   float64
}

func newCrew(configs []simnode.Config) (*crew, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	c := &crew{program: program, changed: make(chan struct{}, 1), arrivals: map[string][]int64{}}
	for _, cfg := range configs {
		c.workers = append(c.workers, &simWorker{c: c, cfg: cfg, spools: make(chan []simnode.SpoolState, 1)})
	}
	return c, nil
}

// errKilled says that a process ended because we killed it.
var errKilled = errors.New("killed by chaos")

// run keeps one process for each worker until ctx ends; a process that ends by
// itself ends all.
func (w *simWorker) run(ctx context.Context) error {
	for {
		err := w.once(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errKilled):
			continue
		case err == nil:
			return nil // told to stop
		}
		return fmt.Errorf("worker of nodes %d to %d: %w", w.cfg.First, w.cfg.First+w.cfg.Count-1, err)
	}
}

// once runs one process to its end.
func (w *simWorker) once(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, w.c.program, "sim", "worker")
	for _, v := range os.Environ() { // the worker needs none of our settings, nor our secrets
		if !strings.HasPrefix(v, "SALLYPORT_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	// Ctrl-C is for us: the workers are told when there is nothing more to do.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	w.mu.Lock()
	w.cmd, w.in = cmd, in
	rate := w.rate
	w.mu.Unlock()
	err = json.NewEncoder(in).Encode(w.cfg)
	if err == nil && rate > 0 {
		err = w.tell(simnode.Command{Rate: &rate})
	}
	read := w.read(out)
	werr := cmd.Wait()
	w.mu.Lock()
	w.before, w.last = total(w.before, w.last), simnode.Report{}
	killed := cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL && w.cfg.Chaos != 0
	w.cmd, w.in = nil, nil
	w.mu.Unlock()
	if killed && ctx.Err() == nil {
		return errKilled
	}
	if werr != nil {
		err = errors.Join(werr, err, read, errors.New(strings.TrimSpace(complaint.String())))
	}
	return err
}

// read takes reports to the end of the process.
func (w *simWorker) read(out io.Reader) error {
	in := json.NewDecoder(out)
	for {
		var r simnode.Report
		if err := in.Decode(&r); err != nil {
			_, _ = io.Copy(io.Discard, out) // a torn line of a process that was killed
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if r.Spools != nil {
			w.spools <- r.Spools
			continue
		}
		w.mu.Lock()
		arrivals := r.Arrivals
		r.Arrivals = nil
		w.last = r
		w.mu.Unlock()
		w.c.mu.Lock()
		for _, a := range arrivals {
			for _, digest := range a.Policies {
				w.c.arrivals[digest] = append(w.c.arrivals[digest], a.At)
			}
		}
		if r.Problem != "" {
			w.c.problem = r.Problem
		}
		w.c.mu.Unlock()
		select {
		case w.c.changed <- struct{}{}:
		default:
		}
	}
}

// total adds the sums of two reports; what is a state is that of the second.
func total(a, b simnode.Report) simnode.Report {
	return simnode.Report{
		Connected: b.Connected, Sessions: b.Sessions, Depth: b.Depth,
		Enrolled: a.Enrolled + b.Enrolled, Dialled: a.Dialled + b.Dialled, Failures: a.Failures + b.Failures, Hellos: a.Hellos + b.Hellos,
		Stored: a.Stored + b.Stored, Acked: a.Acked + b.Acked, Cuts: a.Cuts + b.Cuts,
	}
}

func (w *simWorker) tell(c simnode.Command) error {
	w.mu.Lock()
	in := w.in
	if c.Rate != nil {
		w.rate = *c.Rate
	}
	w.mu.Unlock()
	if in == nil {
		return nil // the next process is told when it starts
	}
	return json.NewEncoder(in).Encode(c)
}

// sum adds up what the processes reported last.
func (c *crew) sum() simnode.Report {
	var all simnode.Report
	for _, w := range c.workers {
		w.mu.Lock()
		r := total(w.before, w.last)
		w.mu.Unlock()
		states := simnode.Report{Connected: all.Connected + r.Connected, Sessions: all.Sessions + r.Sessions, Depth: all.Depth + r.Depth}
		all = total(all, r)
		all.Connected, all.Sessions, all.Depth = states.Connected, states.Sessions, states.Depth
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	all.Problem = c.problem
	return all
}

// rate spreads events over the processes by their nodes.
func (c *crew) rate(perSecond float64, nodes int) error {
	var errs []error
	for _, w := range c.workers {
		part := perSecond * float64(w.cfg.Count) / float64(nodes)
		errs = append(errs, w.tell(simnode.Command{Rate: &part}))
	}
	return errors.Join(errs...)
}

// spools asks every process how far its nodes are.
func (c *crew) spools(ctx context.Context) ([]simnode.SpoolState, error) {
	var all []simnode.SpoolState
	for _, w := range c.workers {
		if err := w.tell(simnode.Command{Spools: true}); err != nil {
			return nil, err
		}
		select {
		case s := <-w.spools:
			all = append(all, s...)
		case <-time.After(time.Minute):
			return nil, cli.Fail(cli.ExitTimeout, "a worker does not answer")
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return all, nil
}

// wait returns when done says so of the sums.
func (c *crew) wait(ctx context.Context, what string, timeout time.Duration, done func(simnode.Report) bool) error {
	late := time.NewTimer(timeout)
	defer late.Stop()
	for {
		r := c.sum()
		if done(r) {
			return nil
		}
		select {
		case <-c.changed:
		case <-late.C:
			text := fmt.Sprintf("%s: not within %s: %d connected, %d events wait", what, timeout, r.Connected, r.Depth)
			if r.Problem != "" {
				text += "; the last failure: " + r.Problem
			}
			return cli.Fail(cli.ExitTimeout, "%s", text)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// killEvery is about how often chaos kills a process.
const killEvery = 20 * time.Second

// chaos kills processes, by a seed, until ctx ends, and counts them.
func (c *crew) chaos(ctx context.Context, seed uint64) (kills int) {
	r := rand.New(rand.NewPCG(seed, 0))
	for {
		wait := time.NewTimer(killEvery/2 + time.Duration(r.Int64N(int64(killEvery))))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return kills
		}
		w := c.workers[r.IntN(len(c.workers))]
		w.mu.Lock()
		if w.cmd != nil && w.cmd.Process.Kill() == nil {
			kills++
		}
		w.mu.Unlock()
	}
}

// stop tells every process to end.
func (c *crew) stop() {
	for _, w := range c.workers {
		_ = w.tell(simnode.Command{Stop: true}) // it ended by itself
	}
}
