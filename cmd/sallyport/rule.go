package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) ruleCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List rules, and what they granted", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) ([]api.Rule, error) { return c.Rules(ctx) })
			if err != nil {
				return err
			}
			t := cli.Table{Columns: []string{"name", "granted", "last", "updated", "updated_by", "spec"}}
			for _, r := range all {
				t.Add(r.Name, fmt.Sprint(r.Granted), cli.Time(deref(r.GrantedAt)), cli.Time(r.Updated), r.UpdatedBy, shortSpec(r.Spec))
			}
			return a.out.Print(all, t)
		}}
	remove := &cobra.Command{Use: "delete NAME", Short: "Delete a rule; what it granted stays, and its join codes are free of it", Args: cli.Exactly(1),
		Long: "Delete a rule. What it granted stays. A join code that no other rule names grants by its token alone from then on,\n" +
			"as any other: those who waited because the rule did not fit are let in. Revoke the code first (sallyport join revoke)\n" +
			"if nobody shall come by it any more.",
		ValidArgsFunction: a.completeNames(1, namesOf((*api.Client).Rules, func(r api.Rule) string { return r.Name })),
		RunE:              a.deletes((*api.Client).DeleteRule)}
	return cli.Group("rule", "Rules by which certificate requests are granted", a.ruleApplyCommand(), list, remove)
}

// shortSpec leaves out of a table what is long and not for reading.
func shortSpec(spec json.RawMessage) string {
	var all map[string]any
	if err := json.Unmarshal(spec, &all); err != nil {
		return string(spec)
	}
	device, ok := all["attestation"].(map[string]any)
	if !ok {
		return string(spec)
	}
	for _, key := range []string{"ca", "crl"} {
		if text, ok := device[key].(string); ok {
			device[key] = fmt.Sprintf("PEM, %d bytes", len(text))
		}
	}
	b, err := json.Marshal(all)
	if err != nil {
		return string(spec)
	}
	return string(b)
}

func (a *app) ruleApplyCommand() *cobra.Command {
	var files []string
	var in api.ApplyRules
	cmd := &cobra.Command{
		Use: "apply -f FILE|- [--dry-run]", Short: "Create and change rules", Args: cli.Exactly(0),
		Long: "Create and change rules: all documents of kind rule in all files, or none.\n" +
			"--dry-run computes the same, says which waiting requests would be granted, and changes nothing.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return cli.Usage("-f: name a file, or - for standard input")
			}
			var err error
			if in.Manifests, err = a.readManifests(files); err != nil {
				return err
			}
			return tell(cmd.Context(), a, a.printRules, func(ctx context.Context, c *api.Client) (api.AppliedRules, error) { return c.ApplyRules(ctx, in) })
		},
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "YAML documents; - is standard input")
	cmd.Flags().BoolVar(&in.DryRun, "dry-run", false, "say what would change and be granted, and change nothing")
	return cmd
}

func (a *app) printRules(out api.AppliedRules) error {
	t := cli.Table{Columns: []string{"kind", "name", "change"}}
	for _, o := range out.Objects {
		t.Add(o.Kind, o.Name, o.Change)
	}
	if err := a.out.Print(out, t); err != nil {
		return err
	}
	if a.out.Format != cli.FormatTable {
		return nil
	}
	granted := 0
	for _, g := range out.Grants {
		verdict := "waits on: " + g.Why
		if g.Rule != "" && g.Why == "" {
			granted++
			verdict = "granted by rule " + g.Rule + prefixed(", which asks for and has seen ", g.Proof)
			if g.Request.State == api.RequestGranted { // it came by a file
				verdict += fmt.Sprintf("; `sallyport request export %s FILE` writes its certificate", g.Request.ID)
			}
		}
		a.out.Say("%s", cli.Clean(fmt.Sprintf("request %s %s %s: %s", g.Request.ID, g.Request.Name, g.Request.Fingerprint, verdict)))
	}
	tense := "are granted: those from files now, the others as soon as their parties are there"
	if out.DryRun {
		tense = "would be granted. Nothing was changed"
	}
	a.out.Say("%d waiting requests %s.", granted, tense)
	return nil
}
