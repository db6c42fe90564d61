package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) requestCommand() *cobra.Command {
	var q api.RequestQuery
	list := &cobra.Command{Use: "list [--state S] [--selector S]", Short: "List certificate requests, newest first", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("selector") && strings.TrimSpace(q.Selector) == "" {
				return errEmptySelector()
			}
			return tell(cmd.Context(), a, listed(a, requestTable), func(ctx context.Context, c *api.Client) ([]api.Request, error) { return c.Requests(ctx, q) })
		}}
	states := []string{api.RequestPending, api.RequestGranted, api.RequestDelivered, api.RequestDenied, api.RequestDiscarded, api.RequestFailed, api.RequestExpired}
	list.Flags().StringVar(&q.State, "state", "", "only those in this state: "+strings.Join(states, ", "))
	list.Flags().StringVar(&q.Selector, "selector", "", "only those with these tags: a Kubernetes label selector, such as role=web,env!=dev")
	_ = list.RegisterFlagCompletionFunc("state", fixed(states...))

	grant := a.decideCommand("grant", "Let parties in")
	grant.cmd.Flags().StringVar(&grant.in.Fingerprint, "fingerprint", "", "grant only the key with this fingerprint, as the other side shows it")
	grant.cmd.Flags().BoolVar(&grant.in.Replace, "replace", false, "revoke a live node of that name, and keep its tags and history")
	grant.cmd.Flags().StringArrayVar(&grant.tags, "tag", nil, "tag that the node gets, k=v, as node tag sets it; may be given several times")
	deny := a.decideCommand("deny", "Refuse parties, and tell them")
	deny.cmd.Flags().StringVar(&deny.in.Reason, "reason", "", "what the party is told")
	discard := a.decideCommand("discard", "Forget requests without telling the parties")
	return cli.Group("request", "Certificate requests", list, grant.cmd, deny.cmd, discard.cmd,
		a.requestImportCommand(), a.requestExportCommand(), a.requestBundleCommand())
}

// deciding is one verdict on one or several requests.
type deciding struct {
	a        *app
	cmd      *cobra.Command
	verb     string
	in       api.DecideRequests
	tags     []string // of a grant
	selector string
	all, yes bool
}

func (a *app) decideCommand(verb, short string) *deciding {
	pending := func(ctx context.Context, c *api.Client) ([]string, error) {
		all, err := c.Requests(ctx, api.RequestQuery{State: api.RequestPending})
		if err != nil {
			return nil, err
		}
		var names []string
		for _, r := range all {
			names = append(names, r.ID)
		}
		return names, nil
	}
	d := &deciding{a: a, verb: verb}
	d.cmd = &cobra.Command{
		Use: verb + " ID|NAME... | --selector S | --all", Short: short, Args: cobra.ArbitraryArgs, ValidArgsFunction: a.completeNames(0, pending), RunE: d.run,
		Long: short + ": those that are named, or every waiting one that --selector or --all takes.\n" +
			"Tags of a request are what its join code says and, beside that, what the party says of itself: anybody may say anything there.\n" +
			"Several are listed with their fingerprints, and decided when that is confirmed; what arrives meanwhile is not among them.",
	}
	f := d.cmd.Flags()
	f.StringVar(&d.selector, "selector", "", "all waiting requests with these tags: a Kubernetes label selector, such as role=web,env!=dev")
	f.BoolVar(&d.all, "all", false, "all waiting requests")
	f.BoolVarP(&d.yes, "yes", "y", false, "do not ask when there are several")
	f.BoolVar(&d.in.DryRun, "dry-run", false, "say what would become of each request, and change nothing")
	return d
}

func (d *deciding) run(cmd *cobra.Command, args []string) error {
	bulk := d.all || cmd.Flags().Changed("selector")
	switch {
	case d.all && cmd.Flags().Changed("selector"):
		return cli.Usage("give either --selector or --all")
	case bulk && len(args) > 0:
		return cli.Usage("give either requests or --selector or --all")
	case !bulk && len(args) == 0:
		return cli.Usage("want `%s`", cmd.UseLine())
	case cmd.Flags().Changed("selector") && strings.TrimSpace(d.selector) == "":
		return errEmptySelector()
	case d.in.Fingerprint != "" && (bulk || len(args) > 1):
		return cli.Usage("--fingerprint with several requests: one fingerprint is for one request")
	}
	var err error
	if d.in.Tags, err = parseTags(d.tags); err != nil {
		return err
	}
	c, err := d.a.client()
	if err != nil {
		return err
	}
	defer c.Close()
	if !bulk && len(args) == 1 && !d.in.DryRun {
		return d.one(cmd.Context(), c, args[0])
	}
	d.in.Refs = args
	if bulk {
		if d.in.Refs, err = d.waiting(cmd.Context(), c); err != nil {
			return err
		}
	}
	if len(d.in.Refs) == 0 {
		d.a.out.Note("No request waits that fits.")
		return d.a.out.Print([]decidedRequest{}, requestTable())
	}
	if !d.in.DryRun {
		if err := cli.Confirm(d.a.streams, d.yes, "%s %d requests", d.verb, len(d.in.Refs)); err != nil {
			return err
		}
	}
	out, err := c.DecideRequests(cmd.Context(), d.verb, d.in)
	if err != nil {
		return err
	}
	return d.print(out)
}

// one keeps the exit codes and the shape of a single decision.
func (d *deciding) one(ctx context.Context, c *api.Client, ref string) error {
	var r api.Request
	var err error
	switch d.verb {
	case "grant":
		r, err = c.GrantRequest(ctx, ref, api.Grant{Fingerprint: d.in.Fingerprint, Replace: d.in.Replace, Tags: d.in.Tags})
	case "deny":
		r, err = c.DenyRequest(ctx, ref, api.Deny{Reason: d.in.Reason})
	default:
		r, err = c.DiscardRequest(ctx, ref)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", d.verb, ref, err)
	}
	return d.a.out.Print(r, requestTable(r))
}

// waiting lists the requests that --selector or --all takes, by their IDs, so
// that exactly what was shown is decided.
func (d *deciding) waiting(ctx context.Context, c *api.Client) ([]string, error) {
	all, err := c.Requests(ctx, api.RequestQuery{State: api.RequestPending, Selector: d.selector})
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(all))
	for i, r := range all {
		ids[i] = r.ID
		if !d.yes && !d.in.DryRun {
			d.a.out.Note("%s", cli.Clean(fmt.Sprintf("%s  %s  %s  %s", r.ID, cmp.Or(r.Name, "-"), r.Fingerprint, cli.Pairs(r.Tags))))
		}
	}
	return ids, nil
}

// decidedRequest is one of several. A request that was not decided has an
// error, and is called what it was called on the command line.
type decidedRequest struct {
	api.Request
	Error string `json:"error,omitempty"`
}

func (d *deciding) print(out api.DecidedRequests) error {
	t := cli.Table{Columns: []string{"id", "role", "name", "state", "fingerprint", "error"}}
	all := make([]decidedRequest, len(out.Results))
	for i, r := range out.Results {
		all[i] = decidedRequest{Request: api.Request{ID: r.Ref}, Error: r.Error}
		if r.Request != nil {
			all[i].Request = *r.Request
		}
		q := all[i]
		t.Add(q.ID, string(q.Role), q.Name, q.State, q.Fingerprint, q.Error)
	}
	if err := d.a.out.Print(all, t); err != nil {
		return err
	}
	if out.DryRun {
		d.a.out.Note("Dry run: %s would decide on %d requests, %d cannot be decided so. Nothing was changed.", d.verb, out.Decided, out.Failed)
	}
	if out.Failed > 0 {
		return cli.Fail(cli.ExitFailed, "%s: %d of %d requests were not decided", d.verb, out.Failed, len(out.Results))
	}
	return nil
}

func requestTable(all ...api.Request) cli.Table {
	t := cli.Table{Columns: []string{"id", "role", "name", "state", "reason", "fingerprint", "source", "rcp", "tags", "requested"}}
	for _, r := range all {
		source := r.Source
		if source != "" && r.RCP != "" {
			source += " (reported by RCP " + r.RCP + ")"
		}
		t.Add(r.ID, string(r.Role), r.Name, r.State, r.Reason, r.Fingerprint, source, r.RCP, cli.Pairs(r.Tags), cli.Time(r.Requested))
	}
	return t
}
