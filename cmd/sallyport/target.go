package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) targetCommand() *cobra.Command {
	names := a.completeNames(1, namesOf((*api.Client).Targets, func(t api.Target) string { return t.Name }))
	list := &cobra.Command{Use: "list", Short: "List targets", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, targetTable), func(ctx context.Context, c *api.Client) ([]api.Target, error) { return c.Targets(ctx) })
		}}
	show := &cobra.Command{Use: "show NAME", Short: "Show a target, the nodes that offer it and its forwards", Args: cli.Exactly(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printTarget, func(ctx context.Context, c *api.Client) (api.TargetDetail, error) { return c.Target(ctx, args[0]) })
		}}
	forward := a.targetForwardCommand()
	forward.ValidArgsFunction = names
	unforward := &cobra.Command{Use: "unforward LISTEN", Short: "Remove a TCP forward and cut its connections", Args: cli.Exactly(1),
		ValidArgsFunction: a.completeNames(1, namesOf((*api.Client).Forwards, func(f api.Forward) string { return f.Listen })),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, printed(a, forwardTable), func(ctx context.Context, c *api.Client) (api.Forward, error) { return c.RemoveForward(ctx, args[0]) })
		}}
	group := cli.Group("target", "Targets: services that nodes can reach", list, show, forward, unforward)
	group.Long = `Targets: TCP and HTTP services that nodes can reach, as policies of type target
name them and SALLYPORT_NODE_ALLOW_TARGETS on the node allows them. ping and echo
are at every node.

A TCP forward listens on the gateway's host and leads to a target. The HTTP relay
needs no listener: a request to /relay/default/TARGET/PATH on the gateway's API, or
/relay/default/TARGET@NODE/PATH, goes to the target at a node that offers it.`
	group.Example = `  sallyport target list
  sallyport target forward intranet-db 5432
  sallyport target forward branch-7/intranet-db 127.0.0.1:5433
  curl --unix-socket "$SALLYPORT_DATA/gateway/api.sock" http://gateway/relay/default/ping/`
	return group
}

func (a *app) targetForwardCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "forward [[NODE/]TARGET LISTEN]",
		Short: "Listen on a TCP port that leads to a target; alone, list what listens",
		Long: "Make the gateway listen on LISTEN and lead each connection to TARGET, at NODE or at the\n" +
			"least busy node that offers it. LISTEN is PORT or :PORT, both on loopback, or ADDRESS:PORT.\n" +
			"A forward stays over restarts of the gateway until `target unforward LISTEN` removes it.\n" +
			"Whoever can connect to it reaches the target, without a token: anything but loopback, and\n" +
			"ports below 1024, need the role admin. Without arguments the forwards are listed.",
		Example: "  sallyport target forward intranet-db 5432\n  sallyport target forward branch-7/intranet-db 10.1.2.3:5432\n  sallyport target forward",
		Args:    cli.Between(0, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch len(args) {
			case 0:
				return tell(cmd.Context(), a, listed(a, forwardTable), func(ctx context.Context, c *api.Client) ([]api.Forward, error) { return c.Forwards(ctx) })
			case 1:
				return cli.Usage("LISTEN is missing: give the PORT or ADDRESS:PORT that leads to %s", args[0])
			}
			in := api.AddForward{Target: args[0], Listen: args[1]}
			if i := strings.LastIndexByte(args[0], '/'); i >= 0 {
				if in.Node, in.Target = args[0][:i], args[0][i+1:]; in.Node == "" || in.Target == "" {
					return cli.Usage("%q: want TARGET or NODE/TARGET", args[0])
				}
			}
			return tell(cmd.Context(), a, printed(a, forwardTable), func(ctx context.Context, c *api.Client) (api.Forward, error) { return c.AddForward(ctx, in) })
		},
	}
}

func targetTable(all ...api.Target) cli.Table {
	t := cli.Table{Columns: []string{"name", "kind", "address", "state", "nodes", "offered", "connected", "streams", "reason"}}
	for _, v := range all {
		t.Add(v.Name, v.Kind, v.Address, v.State, fmt.Sprint(v.Nodes), fmt.Sprint(v.Offered), fmt.Sprint(v.Connected), fmt.Sprint(v.Streams), v.Reason)
	}
	return t
}

func forwardTable(all ...api.Forward) cli.Table {
	t := cli.Table{Columns: []string{"listen", "target", "node", "state", "connections", "total", "refused", "created", "created_by", "error"}}
	for _, f := range all {
		t.Add(f.Listen, f.Target, firstOf(f.Node, string(f.NodeID)), f.State, fmt.Sprint(f.Connections), fmt.Sprint(f.Total), fmt.Sprint(f.Refused), cli.Time(f.Created), f.CreatedBy, f.Error)
	}
	return t
}

// printTarget shows the target, then its nodes, then its forwards; CSV has the
// nodes alone.
func (a *app) printTarget(d api.TargetDetail) error {
	nodes := cli.Table{Columns: []string{"node", "state", "connected", "streams", "address", "avoided_until", "error"}}
	for _, n := range d.On {
		nodes.Add(n.Node, n.State, fmt.Sprint(n.Connected), fmt.Sprint(n.Streams), n.Address, cli.Time(deref(n.Avoided)), n.Error)
	}
	if a.out.Format != cli.FormatTable {
		return a.out.Print(d, nodes)
	}
	if err := a.out.Print(d, targetTable(d.Target)); err != nil {
		return err
	}
	if len(d.On) > 0 {
		a.out.Say("")
		if err := a.out.Print(d, nodes); err != nil {
			return err
		}
	}
	if len(d.Forwards) > 0 {
		a.out.Say("")
		return a.out.Print(d, forwardTable(d.Forwards...))
	}
	return nil
}
