package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
)

func listNodes(c *api.Client, ctx context.Context) ([]api.Node, error) { //nolint:revive // the shape of a method expression, as namesOf wants it
	return c.Nodes(ctx, api.NodeQuery{})
}

func (a *app) nodeNames(most int) cobra.CompletionFunc {
	return a.completeNames(most, namesOf(listNodes, func(n api.Node) string { return n.Name }))
}

func (a *app) nodeCommand() *cobra.Command {
	removal := func(use, short string, f func(*api.Client, context.Context, string) (api.Removal, error)) *cobra.Command {
		return &cobra.Command{Use: use + " NAME", Short: short, Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return tell(cmd.Context(), a, a.printRemoval, func(ctx context.Context, c *api.Client) (api.Removal, error) { return f(c, ctx, args[0]) })
			}}
	}
	drain := a.nodeDrainCommand()
	resume := &cobra.Command{Use: "resume NAME", Short: "End a drain, or a quarantine", Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printNode, func(ctx context.Context, c *api.Client) (api.NodeDetail, error) { return c.ResumeNode(ctx, args[0]) })
		}}
	renew, reidentify := a.nodeRenewCommand(), a.nodeReidentifyCommand()
	return cli.Group("node", "Nodes: the hosts that are managed",
		a.nodeListCommand(), a.nodeShowCommand(), a.nodeTagCommand(), a.nodeTraceCommand(), drain, resume,
		removal("revoke", "Revoke a node's key; it stays listed", (*api.Client).RevokeNode),
		removal("remove", "Revoke a node's key and take it off the list; it may enrol again", (*api.Client).RemoveNode),
		renew, reidentify)
}

func (a *app) nodeDrainCommand() *cobra.Command {
	var in api.DrainNode
	var d cli.DurationFlag
	cmd := &cobra.Command{Use: "drain NAME [--for D] [--reason TEXT]", Short: "Let a node finish what runs and take no more", Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
		Long: `Let a node finish what runs and take no more.

A draining node runs no new actions and takes no new desired state; it goes on
checking and reporting. The node keeps this over restarts, until ` + "`node resume`" + `
or until the time given with --for is over.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			in.For = d.Duration
			return tell(cmd.Context(), a, a.printNode, func(ctx context.Context, c *api.Client) (api.NodeDetail, error) { return c.DrainNode(ctx, args[0], in) })
		}}
	cmd.Flags().Var(&d, "for", "how long; without it until node resume")
	cmd.Flags().StringVar(&in.Reason, "reason", "", "why, for those who look at the node")
	return cmd
}

// nodeStates are what --state takes.
var nodeStates = []string{
	string(wire.StatePending), string(wire.StateRunning), string(wire.StateFailing), string(wire.StateDown), string(wire.StateUnreachable),
	string(wire.StateReadonly), string(wire.StateLocked), string(wire.StateDraining), string(wire.StateQuarantined), string(wire.StateRevoked),
	string(wire.StateUpgrade),
}

func (a *app) nodeListCommand() *cobra.Command {
	var q api.NodeQuery
	cmd := &cobra.Command{Use: "list [--selector S] [--state S]", Short: "List nodes", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("selector") && strings.TrimSpace(q.Selector) == "" {
				return errEmptySelector()
			}
			return tell(cmd.Context(), a, listed(a, nodeTable), func(ctx context.Context, c *api.Client) ([]api.Node, error) { return c.Nodes(ctx, q) })
		}}
	cmd.Flags().StringVar(&q.Selector, "selector", "", "Kubernetes label selector over tags, such as role=web,env!=dev")
	cmd.Flags().StringVar(&q.State, "state", "", "only those in this state")
	_ = cmd.RegisterFlagCompletionFunc("state", fixed(nodeStates...))
	return cmd
}

func errEmptySelector() error {
	return cli.Usage("--selector: an empty selector is refused; '*' is every node")
}

func nodeTable(all ...api.Node) cli.Table {
	t := cli.Table{Columns: []string{"name", "state", "since", "reason", "tags", "rcps", "carrier", "revision", "version", "id"}}
	for _, n := range all {
		t.Add(n.Name, string(n.State), cli.Age(n.StateSince, now()), n.StateReason, cli.Pairs(n.Tags), strings.Join(n.RCPs, ","), n.Carrier, revisions(n), n.Version, string(n.ID))
	}
	return t
}

// revisions shows one number when the node is where it should be.
func revisions(n api.Node) string {
	if n.AppliedRevision == n.DesiredRevision {
		return n.AppliedRevision.String()
	}
	return n.AppliedRevision.String() + " of " + n.DesiredRevision.String()
}

func (a *app) nodeShowCommand() *cobra.Command {
	return &cobra.Command{Use: "show NAME", Short: "Show one node: state, tags and their sources, policies, ways", Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printNode, func(ctx context.Context, c *api.Client) (api.NodeDetail, error) { return c.Node(ctx, args[0]) })
		}}
}

func (a *app) printNode(n api.NodeDetail) error {
	if a.out.Format != cli.FormatTable {
		return a.out.Print(n, nodeTable(n.Node))
	}
	line := func(key, format string, args ...any) {
		a.out.Say("%-13s%s", key, cli.Clean(fmt.Sprintf(format, args...)))
	}
	line("name", "%s", n.Name)
	line("id", "%s", n.ID)
	line("fingerprint", "%s", n.Fingerprint)
	line("state", "%s since %s%s", n.State, cli.Time(n.StateSince), prefixed(": ", n.StateReason))
	line("last seen", "%s", firstOf(cli.Time(deref(n.LastSeen)), "never"))
	line("version", "%s, %s/%s, mode %s, as root: %t", firstOf(n.Version, "unknown"), n.OS, n.Arch, firstOf(n.Mode, "unknown"), n.AsRoot)
	line("revision", "%s", revisions(n.Node))
	line("certificate", "until %s, renewed from %s", firstOf(cli.Time(deref(n.Certificate.NotAfter)), "unknown"), firstOf(cli.Time(deref(n.Certificate.RenewAfter)), "unknown"))
	line("clock", "%+.1f s against the gateway's", n.SkewSeconds)
	line("outbox", "%d waiting, %d dropped", n.Outbox.Depth, n.Outbox.Dropped)
	for _, b := range n.Boots {
		copied := ""
		if b.Copied {
			copied = "; it was copied while it ran, or turned back in time, and has another boot ID now"
		}
		line("boot", "%s answered from %s to %s%s", b.ID, cli.Time(b.First), cli.Time(b.Last), copied)
	}
	for _, s := range n.TagSources {
		hidden := ""
		if !s.Effective {
			hidden = " (not in force" + prefixed(": ", s.Reason) + ")"
		}
		line("tag", "%s=%s from %s%s", s.Key, s.Value, s.Source, hidden)
	}
	for _, p := range n.Paths {
		line("path", "RCP %s%s over %s from %s since %s, %.0f ms%s", p.RCP, prefixed(" via ", strings.Join(p.Via, ", ")), p.Carrier, p.Source, cli.Time(p.Since), p.RTT*1000, prefixed(", boot ", p.Boot))
	}
	for _, d := range n.Deployments {
		line("deployment", "%s", d)
	}
	for _, p := range n.Policies {
		line("policy", "%s (%s) %s%s", p.Policy, p.Type, p.State, prefixed(": ", p.Error))
	}
	return nil
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

func (a *app) nodeTagCommand() *cobra.Command {
	return &cobra.Command{
		Use: "tag NAME k=v... k-...", Short: "Set tags of a node, and remove those that end in '-'", Args: cli.AtLeast(2), ValidArgsFunction: a.nodeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			set, change := config.Tags{}, api.TagChange{}
			for _, arg := range args[1:] {
				if key, remove := strings.CutSuffix(arg, "-"); remove && !strings.Contains(arg, "=") {
					change.Remove = append(change.Remove, key)
					continue
				}
				if _, _, err := config.ParseTag(arg); err != nil {
					return cli.Usage("%w, or key- to remove it", err)
				}
				if err := set.Add(arg); err != nil {
					return cli.Usage("%w", err)
				}
			}
			change.Set = set
			return tell(cmd.Context(), a, a.printNode, func(ctx context.Context, c *api.Client) (api.NodeDetail, error) {
				return c.TagNode(ctx, args[0], change)
			})
		},
	}
}

func (a *app) nodeTraceCommand() *cobra.Command {
	return &cobra.Command{
		Use: "trace NAME", Short: "Show the way to a node, hop by hop, with a verdict", Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			tr, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.Trace, error) { return c.TraceNode(ctx, args[0]) })
			if err != nil {
				return err
			}
			t := cli.Table{Columns: []string{"from", "to", "kind", "address", "dialler", "carrier", "peer", "state", "round_trip", "last_error", "source"}}
			for _, h := range tr.Hops {
				rtt := ""
				if h.RTT > 0 {
					rtt = time.Duration(h.RTT * float64(time.Second)).Round(10 * time.Microsecond).String()
				}
				t.Add(h.From, h.To, h.Kind, h.Address, h.Dialler, h.Carrier, h.Peer, h.State, rtt, h.Error, h.Source)
			}
			if err := a.out.Print(tr, t); err != nil {
				return err
			}
			if a.out.Format == cli.FormatTable {
				a.out.Say("%s", cli.Clean(tr.Verdict))
			}
			if !tr.OK {
				return &cli.ExitError{Code: cli.ExitFailed}
			}
			return nil
		},
	}
}
