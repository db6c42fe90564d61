package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
)

// defaultJoinTTL of a code: a day for carrying it to the other side.
const defaultJoinTTL = wire.Duration(24 * time.Hour)

// checkTTL refuses a code that lives for no time, by which the API means the default.
func checkTTL(ttl wire.Duration) error {
	if ttl <= 0 {
		return cli.Usage("--ttl: a code lives for some time; `sallyport join revoke` ends one")
	}
	return nil
}

func (a *app) joinCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List join codes, without their secrets", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, joinTable), func(ctx context.Context, c *api.Client) ([]api.Join, error) { return c.Joins(ctx) })
		}}
	revoke := &cobra.Command{Use: "revoke ID", Short: "Make a join code useless", Args: cli.Exactly(1),
		ValidArgsFunction: a.completeNames(1, namesOf((*api.Client).Joins, func(j api.Join) string { return j.ID })),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, printed(a, joinTable), func(ctx context.Context, c *api.Client) (api.Join, error) { return c.RevokeJoin(ctx, args[0]) })
		}}
	return cli.Group("join", "Join codes: how nodes enrol", a.joinCreateCommand(), list, revoke)
}

func (a *app) joinCreateCommand() *cobra.Command {
	var in api.CreateJoin
	var tags []string
	var ttl cli.DurationFlag
	var est bool
	cmd := &cobra.Command{
		Use:   "create [--name N] [--tag k=v]... [--uses N] [--ttl D]",
		Short: "Print a join code for nodes",
		Long: "Print a join code, alone, on stdout; what to set on the node's host stands on stderr.\n" +
			"With --manual the code holds no token: the node waits until `sallyport request grant`.\n" +
			"With --est it is the password of an EST client, which gets a certificate for the host --name.",
		Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if in.Tags, err = parseTags(tags); err != nil {
				return err
			}
			if in.Uses < 1 {
				return cli.Usage("--uses: want a number of at least 1")
			}
			if in.Manual && cmd.Flags().Changed("uses") {
				return cli.Usage("--manual with --uses: a code without a token serves any number of nodes, and you grant each")
			}
			if err := checkTTL(ttl.Duration); err != nil {
				return err
			}
			in.TTL = ttl.Duration
			if est {
				for _, other := range []string{"tag", "allow-tag", "rcp", "manual", "replace"} {
					if cmd.Flags().Changed(other) {
						return cli.Usage("--est with --%s: that is for nodes", other)
					}
				}
				return a.createESTCode(cmd.Context(), in)
			}
			if in.Name != "" && in.Uses > 1 {
				return cli.Usage("--name with --uses %d: one name is for one node", in.Uses)
			}
			if in.Name != "" {
				if err := config.CheckName(in.Name); err != nil {
					return cli.Usage("--name: %w", err)
				}
			}
			return tell(cmd.Context(), a, a.printJoin, func(ctx context.Context, c *api.Client) (api.CreatedJoin, error) { return c.CreateJoin(ctx, in) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&in.Name, "name", "", "name of the node")
	f.StringArrayVar(&tags, "tag", nil, "tag that the node gets, k=v; it cannot change it")
	f.StringArrayVar(&in.AllowTags, "allow-tag", nil, "glob over the k=v that the node may set itself; any without it")
	f.IntVar(&in.Uses, "uses", 1, "number of nodes that may use the code")
	ttl.Duration = defaultJoinTTL
	f.Var(&ttl, "ttl", "life of the code")
	f.StringArrayVar(&in.RCPs, "rcp", nil, "RCP whose addresses stand in the code (gateway: those of the gateway itself); all RCPs without it")
	f.BoolVar(&in.Manual, "manual", false, "without a token: an operator grants by hand")
	f.BoolVar(&in.Replace, "replace", false, "revoke a live node of that name, and keep its tags and history")
	f.BoolVar(&est, "est", false, "a code for the EST door; --name is the host name")
	_ = cmd.RegisterFlagCompletionFunc("rcp", a.completeNames(0, namesOf((*api.Client).RCPs, func(r api.RCP) string { return r.Name })))
	return cmd
}

// createESTCode prints the password of an EST client.
func (a *app) createESTCode(ctx context.Context, in api.CreateJoin) error {
	in.Role = api.JoinEST
	j, err := call(ctx, a, func(ctx context.Context, c *api.Client) (api.CreatedJoin, error) { return c.CreateJoin(ctx, in) })
	if err != nil {
		return err
	}
	if a.out.Format != cli.FormatTable {
		return a.out.Print(j, cli.Table{Columns: []string{"id", "code"}, Rows: [][]string{{j.ID, j.Code}}})
	}
	a.out.Note("# The password of the EST client, for HTTP basic authentication (any user name). It is shown this once: put it into a file (mode 0600). Good until %s.", cli.Time(j.Expires))
	return a.out.Raw([]byte(j.Code + "\n"))
}

func (a *app) printJoin(j api.CreatedJoin) error {
	if a.out.Format != cli.FormatTable {
		return a.out.Print(j, cli.Table{Columns: []string{"id", "code"}, Rows: [][]string{{j.ID, j.Code}}})
	}
	a.noteJoin("the node's host", "/etc/sallyport/node.join", "sallyport-node", j, []string{"SALLYPORT_NODE_JOIN=/etc/sallyport/node.join"})
	if len(j.Addresses) == 0 {
		a.out.Note("# The code holds no address: add SALLYPORT_NODE_UPSTREAMS=host:port, or give the RCPs one with `sallyport rcp set NAME --public HOST:PORT`.")
	}
	if j.Manual {
		a.out.Note("# Then compare the fingerprint that `sallyport-node local status` shows with `sallyport request list`, and run `sallyport request grant`.")
	}
	return a.out.Raw([]byte(j.Code + "\n"))
}

func joinTable(all ...api.Join) cli.Table {
	t := cli.Table{Columns: []string{"id", "role", "name", "state", "uses", "tags", "rcps", "kind", "expires", "created_by"}}
	for _, j := range all {
		kind, used := "token", fmt.Sprintf("%d/%d", j.Used, j.Uses)
		if j.Manual {
			kind, used = "manual", strconv.Itoa(j.Used)
		}
		t.Add(j.ID, string(j.Role), j.Name, j.State, used, cli.Pairs(j.Tags), strings.Join(j.RCPs, ","), kind, cli.Time(j.Expires), j.CreatedBy)
	}
	return t
}
