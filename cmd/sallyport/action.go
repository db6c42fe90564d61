package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
)

// exitNoNode is the exit code of `action run` for a node that is not there.
const exitNoNode = 127

func (a *app) actionCommand() *cobra.Command {
	var q api.ActionQuery
	list := &cobra.Command{Use: "list [--node N] [--state S] [--limit N]", Short: "List actions, newest first", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, actionTable), func(ctx context.Context, c *api.Client) ([]api.Action, error) { return c.Actions(ctx, q) })
		}}
	list.Flags().StringVar(&q.Node, "node", "", "only actions on this node")
	list.Flags().StringVar(&q.State, "state", "", "only actions in this state")
	list.Flags().IntVar(&q.Limit, "limit", defaultEvents, "at most so many; 0 is all")
	_ = list.RegisterFlagCompletionFunc("node", a.nodeNames(0))
	_ = list.RegisterFlagCompletionFunc("state", fixed(wire.ActionQueued, wire.ActionSent, wire.ActionRunning, wire.ActionSucceeded, wire.ActionFailed,
		wire.ActionTimedOut, wire.ActionCancelled, wire.ActionExpired, wire.ActionRefused, wire.ActionLost))

	verb := func(use, short string, f func(*api.Client, context.Context, string) (api.Action, error)) *cobra.Command {
		return &cobra.Command{Use: use + " ID", Short: short, Args: cli.Exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return tell(cmd.Context(), a, printed(a, actionTable), func(ctx context.Context, c *api.Client) (api.Action, error) { return f(c, ctx, args[0]) })
			}}
	}
	return cli.Group("action", "Actions: programs that run once on nodes", a.actionRunCommand(), list,
		verb("show", "Show one action", (*api.Client).Action),
		a.actionOutputCommand(),
		verb("cancel", "Cancel an action that waits or runs", (*api.Client).CancelAction))
}

func actionTable(all ...api.Action) cli.Table {
	t := cli.Table{Columns: []string{"id", "node", "state", "exit_code", "reason", "command", "created", "created_by"}}
	for _, x := range all {
		exit := ""
		if x.ExitCode != nil {
			exit = fmt.Sprint(*x.ExitCode)
		}
		t.Add(string(x.ID), x.Node, x.State, exit, x.Reason, strings.Join(x.Command, " "), cli.Time(x.Created), x.CreatedBy)
	}
	return t
}

func (a *app) actionRunCommand() *cobra.Command {
	var in api.RunAction
	var ttl, timeout cli.DurationFlag
	var detach, yes bool
	cmd := &cobra.Command{
		Use:   "run --node NAME|--selector SEL [--ttl D] [--timeout D] [--detach] -- COMMAND...",
		Short: "Run a program on nodes and pass on its output and exit code",
		Long: "Run a program, without a shell, on one node or on all that a selector fits. The exit code is the program's own;\n" +
			"128+n after signal n, 124 expired or timed out, 125 not run or result unknown, 126 refused by the node,\n" +
			"127 node not found. Of several nodes: 0 if all are 0, else 1, and lines carry the node's name.\n" +
			"The first Ctrl-C cancels and waits, the second leaves.",
		Args: cli.AtLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in.Command, in.TTL, in.Timeout = args, ttl.Duration, timeout.Duration
			changed := cmd.Flags().Changed
			switch {
			case changed("node") == changed("selector"):
				return cli.Usage("give either --node or --selector")
			case changed("selector") && strings.TrimSpace(in.Selector) == "":
				return errEmptySelector()
			case changed("node") && in.Node == "":
				return cli.Usage("--node: name a node")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			if err := a.confirmSelector(cmd.Context(), c, in.Selector, yes); err != nil {
				return err
			}
			return a.runAction(cmd.Context(), c, in, detach)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // flags after the first word are the program's
	f.StringVar(&in.Node, "node", "", "node to run on")
	f.StringVar(&in.Selector, "selector", "", "label selector over tags; '*' is every node")
	f.Var(&ttl, "ttl", "how long it may wait for a node that is not connected; 0: not at all")
	f.Var(&timeout, "timeout", "how long it may run; 0: no limit")
	f.BoolVar(&detach, "detach", false, "do not wait: print the actions' IDs")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask when the selector fits several nodes")
	_ = cmd.RegisterFlagCompletionFunc("node", a.nodeNames(0))
	return cmd
}

// confirmSelector asks before a program runs on more than one node.
func (a *app) confirmSelector(ctx context.Context, c *api.Client, selector string, yes bool) error {
	if selector == "" {
		return nil
	}
	nodes, err := c.Nodes(ctx, api.NodeQuery{Selector: selector})
	if err != nil {
		return err
	}
	if len(nodes) < 2 {
		return nil
	}
	return cli.Confirm(a.streams, yes, "run on %d nodes", len(nodes))
}

func (a *app) runAction(ctx context.Context, c *api.Client, in api.RunAction, detach bool) error {
	if in.Key == "" {
		in.Key = string(wire.NewID()) // a retry by a proxy on the way must not run it twice
	}
	started, err := c.StartAction(ctx, in)
	if api.Is(err, api.CodeNotFound) {
		return &cli.ExitError{Code: exitNoNode, Err: err}
	}
	if err != nil {
		return err
	}
	if detach {
		return a.out.Print(started, actionTable(started.Actions...))
	}
	r := newRunOutput(a, started.Actions)
	if err := a.follow(ctx, c, started, r); err != nil {
		return &cli.ExitError{Code: api.ExitNotRun, Err: fmt.Errorf("%w; `sallyport action list` shows how it ended", explain(err))}
	}
	return r.finish()
}

// cancelWait bounds how long the first Ctrl-C waits for the nodes' answers.
const cancelWait = 30 * time.Second

// follow shows the output of a batch until all of it ended. When ctx ends it
// cancels the actions, and goes on reading until they have ended.
func (a *app) follow(ctx context.Context, c *api.Client, started api.StartedActions, r *runOutput) error {
	reading, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	cancelled := make(chan struct{})
	end := context.AfterFunc(ctx, func() {
		defer close(cancelled)
		a.out.Note("cancelling; Ctrl-C again leaves without waiting")
		limited, done := context.WithTimeout(context.WithoutCancel(ctx), cancelWait)
		defer done()
		for _, x := range started.Actions {
			if _, err := c.CancelAction(limited, string(x.ID)); err != nil && !api.Is(err, api.CodeConflict) {
				a.out.Note("cancel %s on %s: %v", x.ID, x.Node, err)
			}
		}
		timer := time.AfterFunc(cancelWait, stop)
		context.AfterFunc(reading, func() { timer.Stop() })
	})
	err := c.FollowActions(reading, started.Batch, r.add)
	if !end() {
		<-cancelled
	}
	return err
}

// runOutput puts the output of one or several actions on stdout and stderr.
type runOutput struct {
	a       *app
	actions []api.Action // as last heard of
	index   map[wire.ID]int
	several bool
	partial map[partialKey][]byte // the unfinished line of a stream, of several actions
	capture [][2]bytes.Buffer     // stdout and stderr, for JSON and CSV
}

type partialKey struct {
	action int
	stream string
}

func newRunOutput(a *app, actions []api.Action) *runOutput {
	r := &runOutput{a: a, actions: actions, index: map[wire.ID]int{}, several: len(actions) > 1, partial: map[partialKey][]byte{}, capture: make([][2]bytes.Buffer, len(actions))}
	for i, x := range actions {
		r.index[x.ID] = i
	}
	return r
}

func (r *runOutput) add(o api.Output) error {
	i, ok := r.index[o.Action]
	if !ok {
		return nil
	}
	if o.End != nil {
		if open := o.End.Ended == nil; open && o.End.Reason != "" && o.End.Reason != r.actions[i].Reason {
			r.a.out.Note("%s: %s", o.End.Node, cli.Clean(o.End.Reason))
		}
		r.actions[i] = *o.End
	}
	if len(o.Data) == 0 {
		return nil
	}
	if r.a.out.Format != cli.FormatTable {
		n := 0
		if o.Stream == streamStderr {
			n = 1
		}
		r.capture[i][n].Write(o.Data)
		return nil
	}
	if !r.several {
		_, err := r.writer(o.Stream).Write(o.Data)
		return err
	}
	key := partialKey{i, o.Stream}
	data := append(r.partial[key], o.Data...)
	for {
		line, rest, found := bytes.Cut(data, []byte("\n"))
		if !found {
			break
		}
		if err := r.line(i, o.Stream, line); err != nil {
			return err
		}
		data = rest
	}
	r.partial[key] = bytes.Clone(data)
	return nil
}

const streamStderr = "stderr"

func (r *runOutput) writer(stream string) io.Writer {
	if stream == streamStderr {
		return r.a.streams.Err
	}
	return r.a.streams.Out
}

func (r *runOutput) line(i int, stream string, line []byte) error {
	_, err := fmt.Fprintf(r.writer(stream), "%s: %s\n", r.actions[i].Node, line)
	return err
}

// capturedAction is what `action run -o json` prints of each action.
type capturedAction struct {
	api.Action
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
}

// finish prints what is left and chooses the exit code.
func (r *runOutput) finish() error {
	for key, rest := range r.partial {
		if len(rest) > 0 {
			if err := r.line(key.action, key.stream, rest); err != nil {
				return err
			}
		}
	}
	if r.a.out.Format != cli.FormatTable {
		all := make([]capturedAction, len(r.actions))
		t := cli.Table{Columns: []string{"id", "node", "state", "exit_status", "reason", "stdout", "stderr"}}
		for i, x := range r.actions {
			all[i] = capturedAction{x, r.capture[i][0].String(), r.capture[i][1].String()}
			t.Add(string(x.ID), x.Node, x.State, fmt.Sprint(x.ExitStatus()), x.Reason, all[i].Stdout, all[i].Stderr)
		}
		if err := r.a.out.Print(all, t); err != nil {
			return err
		}
	}
	worst := 0
	for _, x := range r.actions {
		status := x.ExitStatus()
		if status != 0 {
			worst = 1
		}
		if note := endNote(x); note != "" {
			r.a.out.Note("%s: %s", x.Node, cli.Clean(note))
		}
		if !r.several {
			return exitWith(status)
		}
	}
	return exitWith(worst)
}

// endNote says how an action ended, where its own exit code does not.
func endNote(x api.Action) string {
	note := ""
	if x.State != wire.ActionSucceeded && (x.State != wire.ActionFailed || x.Reason != "") {
		note = x.State + prefixed(": ", x.Reason)
	}
	if x.Truncated {
		note = strings.TrimPrefix(note+"; output above the node's limit was dropped", "; ")
	}
	return note
}

func exitWith(code int) error {
	if code == 0 {
		return nil
	}
	return &cli.ExitError{Code: code}
}

func (a *app) actionOutputCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{Use: "output ID [--follow]", Short: "Show the output of an action", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			x, err := c.Action(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			r := newRunOutput(a, []api.Action{x})
			if err := c.ActionOutput(cmd.Context(), string(x.ID), follow, r.add); err != nil {
				if cli.Interrupted(cmd.Context()) {
					return nil
				}
				return err
			}
			if a.out.Format == cli.FormatTable {
				return nil
			}
			return a.out.Print(capturedAction{r.actions[0], r.capture[0][0].String(), r.capture[0][1].String()},
				cli.Table{Columns: []string{"stdout", "stderr"}, Rows: [][]string{{r.capture[0][0].String(), r.capture[0][1].String()}}})
		}}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for the end of the action")
	return cmd
}
