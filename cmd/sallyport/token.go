package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) tokenCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List API tokens, without their secrets", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, tokenTable), func(ctx context.Context, c *api.Client) ([]api.Token, error) { return c.Tokens(ctx) })
		}}
	revoke := &cobra.Command{Use: "revoke ID", Short: "Make an API token useless", Args: cli.Exactly(1),
		ValidArgsFunction: a.completeNames(1, namesOf((*api.Client).Tokens, func(t api.Token) string { return t.ID })),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, printed(a, tokenTable), func(ctx context.Context, c *api.Client) (api.Token, error) { return c.RevokeToken(ctx, args[0]) })
		}}
	return cli.Group("token", "API tokens for https://", a.tokenCreateCommand(), list, revoke)
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var in api.CreateToken
	var role string
	var ttl cli.DurationFlag
	var roles []string
	for _, r := range api.Roles {
		roles = append(roles, string(r))
	}
	cmd := &cobra.Command{Use: "create --role R --ttl D [--name N]", Short: "Print a new API token, alone, on stdout", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if role == "" || ttl.Duration == 0 {
				return cli.Usage("--role and --ttl: say what the token may do, and for how long")
			}
			in.Role, in.TTL = api.Role(role), ttl.Duration
			t, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.CreatedToken, error) { return c.CreateToken(ctx, in) })
			if err != nil {
				return err
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(t, cli.Table{Columns: []string{"id", "token"}, Rows: [][]string{{t.ID, t.Secret}}})
			}
			a.out.Note("# token %s, role %s, good until %s. It is shown this once: put it into a file (mode 0600) and set", t.ID, t.Role, cli.Time(t.Expires))
			a.out.Note("SALLYPORT_TOKEN_FILE=/path/of/that/file")
			return a.out.Raw([]byte(t.Secret + "\n"))
		}}
	cmd.Flags().StringVar(&role, "role", "", "viewer, operator, admin or certificate-officer")
	cmd.Flags().Var(&ttl, "ttl", "life of the token")
	cmd.Flags().StringVar(&in.Name, "name", "", "what it is for")
	_ = cmd.RegisterFlagCompletionFunc("role", fixed(roles...))
	return cmd
}

func tokenTable(all ...api.Token) cli.Table {
	t := cli.Table{Columns: []string{"id", "name", "role", "state", "created", "expires", "last_used", "created_by"}}
	for _, k := range all {
		t.Add(k.ID, k.Name, string(k.Role), k.State, cli.Time(k.Created), cli.Time(k.Expires), cli.Time(deref(k.LastUsed)), k.CreatedBy)
	}
	return t
}

func (a *app) auditCommand() *cobra.Command {
	var q api.AuditQuery
	var since cli.DurationFlag
	list := &cobra.Command{Use: "list [--who W] [--what W] [--since D] [--limit N]", Short: "List who changed what, newest first", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if since.Duration > 0 {
				q.Since = now().Add(-since.Std())
			}
			all, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) ([]api.AuditEntry, error) { return c.Audit(ctx, q) })
			if err != nil {
				return err
			}
			t := cli.Table{Columns: []string{"time", "who", "from", "what", "object", "result", "detail", "pos"}}
			for _, e := range all {
				t.Add(cli.Time(e.Time), e.Who, e.From, e.What, e.Object, e.Result, e.Detail, fmt.Sprint(e.Pos))
			}
			return a.out.Print(all, t)
		}}
	f := list.Flags()
	f.StringVar(&q.Who, "who", "", "only changes by this caller")
	f.StringVar(&q.What, "what", "", "only changes of this kind, such as request.grant")
	f.Var(&since, "since", "only changes in this time")
	f.IntVar(&q.Limit, "limit", defaultEvents, "at most so many; 0 is all")
	return cli.Group("audit", "The audit log", list)
}
