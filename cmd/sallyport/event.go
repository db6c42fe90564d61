package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
)

func (a *app) eventCommand() *cobra.Command {
	verb := func(use, short string, f func(*api.Client, context.Context, string) (api.EventDetail, error)) *cobra.Command {
		return &cobra.Command{Use: use + " ID", Short: short, Args: cli.Exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return tell(cmd.Context(), a, a.printEvent, func(ctx context.Context, c *api.Client) (api.EventDetail, error) { return f(c, ctx, args[0]) })
			}}
	}
	annotate := &cobra.Command{Use: "annotate ID TEXT", Short: "Add a remark to an event", Args: cli.Exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printEvent, func(ctx context.Context, c *api.Client) (api.EventDetail, error) {
				return c.AnnotateEvent(ctx, args[0], api.Annotate{Text: args[1]})
			})
		}}
	return cli.Group("event", "Events: what nodes reported", a.eventListCommand(), a.eventTailCommand(),
		verb("show", "Show one event", (*api.Client).Event),
		verb("ack", "Acknowledge an event", (*api.Client).AckEvent),
		verb("close", "Close an event", (*api.Client).CloseEvent),
		annotate)
}

var eventColumns = []string{"received", "severity", "node", "object", "text", "state", "count", "id"}

func eventCells(e api.Event) []string {
	return []string{cli.Time(e.Received), string(e.Severity), e.Node, e.Object, e.Text, e.State, fmt.Sprint(e.Count), string(e.ID)}
}

// eventFlags are the filters that list and tail share.
func (a *app) eventFlags(cmd *cobra.Command, q *api.EventQuery) {
	cmd.Flags().StringVar(&q.Node, "node", "", "only events of this node")
	cmd.Flags().StringVar(&q.Severity, "severity", "", "only events of this severity")
	_ = cmd.RegisterFlagCompletionFunc("node", a.nodeNames(0))
	var names []string
	for _, s := range wire.Severities {
		names = append(names, string(s))
	}
	_ = cmd.RegisterFlagCompletionFunc("severity", fixed(names...))
}

func checkSeverity(s string) error {
	if s == "" {
		return nil
	}
	if _, err := wire.ParseSeverity(s); err != nil {
		return cli.Usage("--severity: %w", err)
	}
	return nil
}

// defaultEvents is a screenful or two; --limit 0 is all.
const defaultEvents = 100

func (a *app) eventListCommand() *cobra.Command {
	var q api.EventQuery
	var since cli.DurationFlag
	cmd := &cobra.Command{Use: "list [--node N] [--severity S] [--since D] [--limit N]", Short: "List events, newest first", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkSeverity(q.Severity); err != nil {
				return err
			}
			if q.Limit < 0 {
				return cli.Usage("--limit: want 0 or more")
			}
			if since.Duration > 0 {
				q.Since = now().Add(-since.Std())
			}
			all, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) ([]api.Event, error) { return c.Events(ctx, q) })
			if err != nil {
				return err
			}
			t := cli.Table{Columns: eventColumns}
			for _, e := range all {
				t.Add(eventCells(e)...)
			}
			return a.out.Print(all, t)
		}}
	a.eventFlags(cmd, &q)
	f := cmd.Flags()
	f.Var(&since, "since", "only events received in this time")
	f.IntVar(&q.Limit, "limit", defaultEvents, "at most so many; 0 is all")
	f.StringVar(&q.State, "state", "", "only events in this state: open, acknowledged, closed")
	f.StringVar(&q.Key, "key", "", "only events with this key")
	f.BoolVar(&q.Merged, "merged", false, "also those that were merged into another by their key")
	_ = cmd.RegisterFlagCompletionFunc("state", fixed(api.EventOpen, api.EventAcknowledged, api.EventClosed))
	return cmd
}

func (a *app) eventTailCommand() *cobra.Command {
	var q api.EventQuery
	cmd := &cobra.Command{Use: "tail [--node N] [--severity S]", Short: "Show events as they come, until Ctrl-C", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkSeverity(q.Severity); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			show := a.out.Stream(eventColumns)
			err = a.tail(cmd.Context(), c, q, func(e api.Event) error { return show(e, eventCells(e)...) })
			if cli.Interrupted(cmd.Context()) {
				return nil
			}
			return err
		}}
	a.eventFlags(cmd, &q)
	return cmd
}

// tailRetry is how long a tail waits before it asks a gateway again that went
// away: a restart takes about so long.
const tailRetry = time.Second

// tail survives restarts of the gateway: it goes on after the last event seen.
func (a *app) tail(ctx context.Context, c *api.Client, q api.EventQuery, show func(api.Event) error) error {
	after := int64(-1)
	for connected := false; ; {
		var shown error
		err := c.TailEvents(ctx, q, after, func(e api.Event) error {
			connected, after = true, e.Pos
			shown = show(e)
			return shown
		})
		var problem *api.Problem
		if ctx.Err() != nil || shown != nil || errors.As(err, &problem) || (err != nil && !connected) {
			return err
		}
		a.out.Note("the gateway went away; asking again")
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(tailRetry):
		}
	}
}

func (a *app) printEvent(e api.EventDetail) error {
	if a.out.Format != cli.FormatTable {
		return a.out.Print(e, cli.Table{Columns: eventColumns, Rows: [][]string{eventCells(e.Event)}})
	}
	line := func(key, value string) {
		if value != "" {
			a.out.Say("%-13s%s", key, cli.Clean(value))
		}
	}
	line("id", string(e.ID))
	line("node", e.Node)
	line("severity", string(e.Severity))
	line("application", e.Application)
	line("object", e.Object)
	line("key", e.Key)
	line("text", e.Text)
	line("state", e.State+prefixed(" by ", e.ChangedBy))
	line("count", fmt.Sprint(e.Count))
	line("time", cli.Time(e.Time))
	line("received", cli.Time(e.Received))
	line("place", fmt.Sprintf("spool %s, seq %d", e.Spool, e.Seq))
	for _, n := range e.Annotations {
		line("remark", cli.Time(n.Time)+" "+n.By+": "+n.Text)
	}
	return nil
}
