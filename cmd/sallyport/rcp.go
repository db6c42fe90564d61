package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) rcpCommand() *cobra.Command {
	names := a.completeNames(1, namesOf((*api.Client).RCPs, func(r api.RCP) string { return r.Name }))
	verb := func(use, short string, f func(*api.Client, context.Context, string) (api.RCP, error)) *cobra.Command {
		return &cobra.Command{Use: use + " NAME", Short: short, Args: cli.Exactly(1), ValidArgsFunction: names,
			RunE: func(cmd *cobra.Command, args []string) error {
				return tell(cmd.Context(), a, printed(a, rcpTable), func(ctx context.Context, c *api.Client) (api.RCP, error) { return f(c, ctx, args[0]) })
			}}
	}
	join := a.rcpJoinCommand()
	set := a.rcpSetCommand()
	remove := &cobra.Command{Use: "remove NAME", Short: "Revoke an RCP and take it off the list", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printRemoval, func(ctx context.Context, c *api.Client) (api.Removal, error) { return c.RemoveRCP(ctx, args[0]) })
		}}
	for _, c := range []*cobra.Command{join, set, remove} {
		c.ValidArgsFunction = names
	}
	return cli.Group("rcp", "RCPs: the boxes that join channels",
		a.rcpAddCommand(), a.rcpListCommand(),
		verb("show", "Show one RCP", (*api.Client).RCP),
		set, join,
		verb("drain", "Let an RCP finish what runs and take no more", (*api.Client).DrainRCP),
		verb("resume", "End a drain", (*api.Client).ResumeRCP),
		remove,
		verb("retry", "Dial a failed RCP at once", (*api.Client).RetryRCP))
}

func (a *app) rcpAddCommand() *cobra.Command {
	var in api.AddRCP
	var ttl cli.DurationFlag
	cmd := &cobra.Command{
		Use:   "add NAME [HOST:PORT] [--public HOST:PORT]... [--via RCP]",
		Short: "Add an RCP and print its join code",
		Long: "Add an RCP and print its join code, alone, on stdout; what to set on its host stands on stderr.\n" +
			"With HOST:PORT the gateway dials it; without, it dials the gateway's channel port.",
		Args: cli.Between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkTTL(ttl.Duration); err != nil {
				return err
			}
			in.Name, in.TTL = args[0], ttl.Duration
			if err := config.CheckName(in.Name); err != nil {
				return cli.Usage("NAME: %w", err)
			}
			if len(args) > 1 {
				in.Address = args[1]
			}
			if err := checkAddrs(append([]string{in.Address}, in.Public...)); err != nil {
				return err
			}
			return tell(cmd.Context(), a, a.printRCPJoin, func(ctx context.Context, c *api.Client) (api.RCPJoin, error) { return c.AddRCP(ctx, in) })
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&in.Public, "public", nil, "address by which nodes reach it; HOST:PORT without it")
	f.StringVar(&in.Via, "via", "", "name of the RCP behind which it stands")
	_ = cmd.RegisterFlagCompletionFunc("via", a.completeNames(0, namesOf((*api.Client).RCPs, func(r api.RCP) string { return r.Name })))
	ttl.Duration = defaultJoinTTL
	f.Var(&ttl, "ttl", "life of the join code")
	return cmd
}

func checkAddrs(addrs []string) error {
	for _, addr := range addrs {
		if addr == "" {
			continue
		}
		if err := config.CheckAddr(addr); err != nil {
			return cli.Usage("%w", err)
		}
	}
	return nil
}

func (a *app) rcpJoinCommand() *cobra.Command {
	var in api.JoinRCP
	var ttl cli.DurationFlag
	cmd := &cobra.Command{
		Use: "join NAME [--replace]", Short: "Print a new join code for an RCP", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkTTL(ttl.Duration); err != nil {
				return err
			}
			in.TTL = ttl.Duration
			return tell(cmd.Context(), a, a.printRCPJoin, func(ctx context.Context, c *api.Client) (api.RCPJoin, error) { return c.JoinRCP(ctx, args[0], in) })
		},
	}
	ttl.Duration = defaultJoinTTL
	cmd.Flags().Var(&ttl, "ttl", "life of the join code")
	cmd.Flags().BoolVar(&in.Replace, "replace", false, "revoke the identity that it has")
	return cmd
}

// printRCPJoin prints the code alone on stdout, so that it can be piped into a
// file, and the environment of the other side on stderr.
func (a *app) printRCPJoin(r api.RCPJoin) error {
	if a.out.Format != cli.FormatTable {
		return a.out.Print(r, cli.Table{Columns: []string{"name", "code"}, Rows: [][]string{{r.RCP.Name, r.Join.Code}}})
	}
	lines := []string{"SALLYPORT_RCP_JOIN=/etc/sallyport/rcp.join"}
	if port := portOf(r.RCP.Address); port != "" && port != "9090" {
		lines = append(lines, "SALLYPORT_RCP_LISTEN=:"+port)
	}
	if len(r.Upstreams) > 0 {
		lines = append(lines, "SALLYPORT_RCP_UPSTREAMS="+strings.Join(r.Upstreams, ";"))
	}
	a.noteJoin("the RCP's host", "/etc/sallyport/rcp.join", "sallyport-rcp", r.Join, lines)
	switch {
	case len(r.Downstreams) > 0:
		a.out.Note("# On the host of RCP %s, which dials it: add %s to SALLYPORT_RCP_DOWNSTREAMS.", r.RCP.Via, strings.Join(r.Downstreams, ";"))
		if len(r.Upstreams) == 0 {
			a.out.Note("# And name the UUID of RCP %s in SALLYPORT_RCP_UPSTREAMS of the new one, once that is enrolled (`sallyport rcp join %s` shows it).", r.RCP.Via, r.RCP.Name)
		}
	case r.RCP.Address == "" && len(r.Upstreams) == 0 && r.RCP.Via != "":
		a.out.Note("# It has to dial RCP %s, which has no public address: set SALLYPORT_RCP_UPSTREAMS to where it listens.", r.RCP.Via)
	case r.RCP.Address == "" && len(r.Upstreams) == 0:
		a.out.Note("# It has to dial this gateway, which does not listen: set SALLYPORT_GATEWAY_CHANNEL_LISTEN and SALLYPORT_GATEWAY_CHANNEL_PUBLIC here, and SALLYPORT_RCP_UPSTREAMS to the latter there.")
	}
	return a.out.Raw([]byte(r.Join.Code + "\n"))
}

// noteJoin writes to stderr what the other side needs.
func (a *app) noteJoin(host, file, program string, j api.CreatedJoin, env []string) {
	a.out.Note("# join code %s, good until %s for %s.", j.ID, cli.Time(j.Expires), uses(j))
	a.out.Note("# On %s: put the line from stdout into %s (mode 0600), and start `%s` with", host, file, program)
	for _, line := range env {
		a.out.Note("%s", line)
	}
}

func uses(j api.CreatedJoin) string {
	switch {
	case j.Manual:
		return "any number of nodes, each granted by hand"
	case j.Uses == 1:
		return "one use"
	}
	return fmt.Sprintf("%d uses", j.Uses)
}

func portOf(addr string) string {
	if i := strings.LastIndexByte(addr, ':'); i >= 0 {
		return addr[i+1:]
	}
	return ""
}

func (a *app) rcpSetCommand() *cobra.Command {
	var address, via string
	var public []string
	cmd := &cobra.Command{
		Use: "set NAME [--address HOST:PORT] [--public HOST:PORT]... [--via RCP]", Short: "Change how an RCP is reached", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var in api.SetRCP
			changed := cmd.Flags().Changed
			if changed("address") {
				in.Address = &address
			}
			if changed("public") {
				in.Public = &public
			}
			if changed("via") {
				in.Via = &via
			}
			if in == (api.SetRCP{}) {
				return cli.Usage("nothing to set: give --address, --public or --via")
			}
			if err := checkAddrs(append([]string{address}, public...)); err != nil {
				return err
			}
			return tell(cmd.Context(), a, printed(a, rcpTable), func(ctx context.Context, c *api.Client) (api.RCP, error) { return c.SetRCP(ctx, args[0], in) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&address, "address", "", "that the gateway dials; empty: it dials the gateway")
	f.StringArrayVar(&public, "public", nil, "address by which nodes reach it")
	f.StringVar(&via, "via", "", "name of the RCP behind which it stands; empty: none")
	_ = cmd.RegisterFlagCompletionFunc("via", a.completeNames(0, namesOf((*api.Client).RCPs, func(r api.RCP) string { return r.Name })))
	return cmd
}

func (a *app) rcpListCommand() *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List RCPs", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, rcpTable), func(ctx context.Context, c *api.Client) ([]api.RCP, error) { return c.RCPs(ctx) })
		}}
}

func rcpTable(all ...api.RCP) cli.Table {
	t := cli.Table{Columns: []string{"name", "state", "since", "address", "carrier", "nodes", "pending", "via", "version", "clock", "id", "last_error"}}
	for _, r := range all {
		if r.Request != "" { // which says more than what dialling it meets
			r.LastError = r.StateReason
		}
		t.Add(r.Name, r.State, cli.Age(r.StateSince, now()), r.Address, r.Carrier, fmt.Sprint(r.Online), fmt.Sprint(r.Pending), r.Via, r.Version, fmt.Sprintf("%+.1f s", r.SkewSeconds), string(r.ID), firstOf(r.LastError, r.StateReason))
	}
	return t
}

func (a *app) printRemoval(r api.Removal) error {
	return a.out.Print(r, cli.Table{Columns: []string{"id", "name", "revocations"}, Rows: [][]string{{string(r.ID), r.Name, fmt.Sprint(r.Revocations)}}})
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// parseTags reads repeated --tag k=v flags.
func parseTags(pairs []string) (map[string]string, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	m := config.Tags{}
	for _, p := range pairs {
		if err := m.Add(p); err != nil {
			return nil, cli.Usage("%w", err)
		}
	}
	return m, nil
}
