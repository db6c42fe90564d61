package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
)

// maxLeft is how many of the parties that are left are named on a terminal.
const maxLeft = 20

func (a *app) caRolloverCommands() []*cobra.Command {
	return []*cobra.Command{a.caShowCommand(), a.caRotateCommand(), a.caFinishCommand(), a.caAbortCommand()}
}

func (a *app) caShowCommand() *cobra.Command {
	return &cobra.Command{Use: "show", Short: "Show roots and intermediates, and who is not on the issuing one", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ca, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.CA, error) { return c.CA(ctx) })
			if err != nil {
				return err
			}
			if err := a.printCA(ca, ca); err != nil || a.out.Format != cli.FormatTable {
				return err
			}
			a.noteParties("left", ca.Left)
			return nil
		}}
}

func (a *app) caRotateCommand() *cobra.Command {
	rotate := func(what, short, long string) *cobra.Command {
		in := api.RotateCA{What: what}
		yes := false
		cmd := &cobra.Command{Use: what + " [--dry-run] [--yes]", Short: short, Long: long, Args: cli.Exactly(0),
			RunE: func(cmd *cobra.Command, _ []string) error {
				return a.changeCA(cmd.Context(), in.DryRun || yes, func(ctx context.Context, c *api.Client, dry bool) (api.CAChange, error) {
					try := in
					try.DryRun = dry || in.DryRun
					return c.RotateCA(ctx, try)
				}, "replace the "+what+" of the certificate authority, and renew %d parties")
			}}
		if what == wire.RolloverRoot {
			cmd.Use = what + " [--fingerprint SHA256 [--without-cross]] [--dry-run] [--yes]"
			cmd.Flags().StringVar(&in.Fingerprint, "fingerprint", "", "trust this new root of the external CA: SHA-256 of its certificate, from whoever made it")
			cmd.Flags().BoolVar(&in.WithoutCross, "without-cross", false, "the old root has signed nothing for the new intermediate; every party must have the new list of roots")
		}
		cmd.Flags().BoolVar(&in.DryRun, "dry-run", false, "say what would happen: who is offline, which join codes pin the old root")
		cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
		return cmd
	}
	return cli.Group("rotate", "Replace an issuer of certificates",
		rotate(wire.RolloverIntermediate, "Make a new intermediate, and renew everybody onto it",
			"A new intermediate issues from now on, and the gateway renews every party onto it.\nThe old one stays trusted until `sallyport ca finish`."),
		rotate(wire.RolloverRoot, "Make a new root and a new intermediate, and renew everybody onto them",
			"A new root with a new intermediate issues from now on. Each root vouches for the other's\nintermediate, so that join codes and parties that know only the old one go on working.\nThe old root stays trusted until `sallyport ca finish`; `sallyport ca abort` goes back.\n\nWhere an external step-ca issues, --fingerprint names the new root that it has. That is trusted beside the\nold one at once, and parties are renewed when step-ca issues below it."))
}

func (a *app) caFinishCommand() *cobra.Command {
	var in api.FinishCA
	yes := false
	cmd := &cobra.Command{Use: "finish [--force] [--forget] [--dry-run] [--yes]", Short: "Trust no longer what a rollover has replaced", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.changeCA(cmd.Context(), in.DryRun || yes, func(ctx context.Context, c *api.Client, dry bool) (api.CAChange, error) {
				try := in
				try.DryRun = dry || in.DryRun
				return c.FinishCA(ctx, try)
			}, "trust the old issuer no longer (%d parties)")
		}}
	cmd.Flags().BoolVar(&in.Force, "force", false, "although parties are left, which are renewed when they come back, or certificates of the doors, which are not")
	cmd.Flags().BoolVar(&in.Forget, "forget", false, "the old root vouches for nothing any more: what missed the rollover needs a new join code")
	cmd.Flags().BoolVar(&in.DryRun, "dry-run", false, "say what would happen")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *app) caAbortCommand() *cobra.Command {
	return &cobra.Command{Use: "abort", Short: "Turn a rollover round: everybody goes back to the old issuer", Args: cli.Exactly(0),
		Long: "The old issuer signs again, and everybody is renewed back onto it; `sallyport ca finish` then gives up the new one.\nDone once more it turns the rollover round again: the new issuer goes on.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, a.printCAChange, func(ctx context.Context, c *api.Client) (api.CAChange, error) { return c.AbortCA(ctx) })
		}}
}

// changeCA rehearses, asks, and changes; sure leaves out the asking.
func (a *app) changeCA(ctx context.Context, sure bool, change func(ctx context.Context, c *api.Client, dry bool) (api.CAChange, error), question string) error {
	return tell(ctx, a, a.printCAChange, func(ctx context.Context, c *api.Client) (api.CAChange, error) {
		if !sure {
			plan, err := change(ctx, c, true)
			if err != nil {
				return plan, err
			}
			a.noteCAChange(plan)
			if err := cli.Confirm(a.streams, false, question, plan.CA.Parties); err != nil {
				return plan, err
			}
		}
		return change(ctx, c, false)
	})
}

func (a *app) printCAChange(ch api.CAChange) error {
	a.noteCAChange(ch)
	return a.printCA(ch, ch.CA)
}

// noteCAChange tells a person what is to be known.
func (a *app) noteCAChange(ch api.CAChange) {
	if a.out.Format != cli.FormatTable {
		return
	}
	for _, n := range ch.Notes {
		a.out.Note("%s", n)
	}
	if ch.DryRun {
		a.noteParties("offline", ch.Offline)
	}
	for i, c := range ch.Certificates {
		if i == maxLeft {
			a.out.Note("  and %d more certificates (-o json names them all)", len(ch.Certificates)-maxLeft)
			break
		}
		a.out.Note("  certificate %s (%s %s), issued %s, until %s", c.Serial, c.Door, strings.Join(c.Names, " "), cli.Time(c.Issued), cli.Time(c.Expires))
	}
	for i, j := range ch.Joins {
		if i == maxLeft {
			a.out.Note("  and %d more join codes (-o json names them all)", len(ch.Joins)-maxLeft)
			break
		}
		a.out.Note("  join code %s (%s), until %s, pins root %s", j.ID, strings.TrimSpace(string(j.Role)+" "+j.Name), cli.Time(j.Expires), j.Root)
	}
}

func (a *app) noteParties(what string, parties []api.CAParty) {
	for i, p := range parties {
		if i == maxLeft {
			a.out.Note("  and %d more (-o json names them all)", len(parties)-maxLeft)
			return
		}
		where := "connected"
		if !p.Connected {
			where = "offline, last seen " + cli.Time(deref(p.LastSeen))
		}
		a.out.Note("  %s: %s %s (%s): %s", what, p.Role, p.Name, where, p.Reason)
	}
}

// printCA prints the issuers as a table, and all of v as JSON.
func (a *app) printCA(v any, ca api.CA) error {
	t := cli.Table{Columns: []string{"kind", "n", "state", "root", "not_after", "fingerprint"}}
	for _, r := range ca.Roots {
		t.Add("root", fmt.Sprint(r.N), r.State, "", cli.Time(r.NotAfter), r.Fingerprint)
	}
	for _, i := range ca.Intermediates {
		t.Add("intermediate", fmt.Sprint(i.N), i.State, fmt.Sprint(i.Root), cli.Time(i.NotAfter), i.Fingerprint)
	}
	if err := a.out.Print(v, t); err != nil || a.out.Format != cli.FormatTable {
		return err
	}
	if ca.Problem != "" {
		a.out.Note("%s", ca.Problem)
	}
	for _, st := range ca.Status {
		a.out.Note("revocation of parties, intermediate %d: CRL %s; OCSP %s", st.Intermediate, st.CRL, st.OCSP)
		if st.Missing > 0 {
			a.out.Note("  %d revoked certificates are not in that CRL yet", st.Missing)
		}
		if st.Problem != "" {
			a.out.Note("  %s", st.Problem)
		}
	}
	if r := ca.Rollover; r != nil {
		way := "under way"
		if r.Aborted {
			way = "aborted, going back"
		}
		if r.Named {
			way = "the new root is trusted, and " + ca.External + " still issues below the old one"
			if len(ca.Left) == 0 {
				way += "; every party has the new list of roots: have it issue below the new one"
			}
		}
		if r.Waits != "" {
			a.out.Note("%s", r.Waits)
		}
		a.out.Note("rollover of the %s since %s: %s; %d of %d parties are on the issuing intermediate", r.Kind, cli.Time(r.Since), way, ca.Moved, ca.Parties)
		if len(ca.Left) == 0 && !r.Named {
			a.out.Note("nobody is left: `sallyport ca finish` ends it")
		}
	}
	if len(ca.Left) > 0 {
		a.out.Note("%d parties have yet to follow: `sallyport ca show` names them", len(ca.Left))
	}
	return nil
}
