package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"gopkg.in/yaml.v3"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) policyCommand() *cobra.Command {
	names := a.completeNames(1, namesOf((*api.Client).Policies, func(p api.Policy) string { return p.Name }))
	list := &cobra.Command{Use: "list", Short: "List policies", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, policyTable), func(ctx context.Context, c *api.Client) ([]api.Policy, error) { return c.Policies(ctx) })
		}}
	remove := &cobra.Command{Use: "delete NAME", Short: "Delete a policy that no deployment names", Args: cli.Exactly(1), ValidArgsFunction: names,
		RunE: a.deletes((*api.Client).DeletePolicy)}
	verbs := []*cobra.Command{a.policyShowCommand(), a.policyDiffCommand(), a.policyRollbackCommand()}
	for _, v := range verbs {
		v.ValidArgsFunction = names
	}
	return cli.Group("policy", "Policies: what a node should have and do",
		append([]*cobra.Command{a.applyVerb("apply -f FILE|-", "Create and change the policies of a file", "policy"), list, remove}, verbs...)...)
}

func policyTable(all ...api.Policy) cli.Table {
	t := cli.Table{Columns: []string{"name", "type", "version", "deployments", "created", "created_by"}}
	for _, p := range all {
		t.Add(p.Name, p.Type, fmt.Sprint(p.Version), strings.Join(p.Deployments, ","), cli.Time(p.Created), p.CreatedBy)
	}
	return t
}

func (a *app) policy(cmd *cobra.Command, name string) (api.PolicyDetail, error) {
	return call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.PolicyDetail, error) { return c.Policy(ctx, name) })
}

func (a *app) policyShowCommand() *cobra.Command {
	return &cobra.Command{Use: "show NAME", Short: "Show a policy and its versions", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.policy(cmd, args[0])
			if err != nil {
				return err
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(p, policyTable(p.Policy))
			}
			text, err := document(p.Name, p.Type, p.Spec)
			if err != nil {
				return err
			}
			for _, v := range p.Versions {
				a.out.Say("# version %d, %s by %s", v.Version, cli.Time(v.Created), v.CreatedBy)
			}
			return a.out.Raw([]byte(text))
		}}
}

func (a *app) policyDiffCommand() *cobra.Command {
	var from, to int64
	cmd := &cobra.Command{Use: "diff NAME [--from N] [--to N]", Short: "Compare two versions of a policy: the last two without flags", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.policy(cmd, args[0])
			if err != nil {
				return err
			}
			if to == 0 {
				to = p.Version
			}
			if from == 0 {
				if from = to - 1; from == 0 {
					return cli.Fail(cli.ExitNotFound, "version 1 of policy %s is its first: there is none before it to compare it with", p.Name)
				}
			}
			oldText, err := versionText(p, from)
			if err != nil {
				return err
			}
			newText, err := versionText(p, to)
			if err != nil {
				return err
			}
			lines := diff(oldText, newText)
			t := cli.Table{Columns: []string{"change", "line"}}
			type change struct {
				Change string `json:"change"` // "-", "+" or " "
				Line   string `json:"line"`
			}
			all := []change{}
			for _, l := range lines {
				all = append(all, change{l[:1], l[1:]})
				t.Add(l[:1], l[1:])
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(all, t)
			}
			for _, l := range lines {
				a.out.Say("%s", l)
			}
			return nil
		}}
	cmd.Flags().Int64Var(&from, "from", 0, "older version (default: the one before --to)")
	cmd.Flags().Int64Var(&to, "to", 0, "newer version (default: the current one)")
	return cmd
}

func versionText(p api.PolicyDetail, n int64) (string, error) {
	for _, v := range p.Versions {
		if v.Version == n {
			return document(p.Name, v.Type, v.Spec)
		}
	}
	return "", cli.Fail(cli.ExitNotFound, "policy %s has no version %d; it has %d", p.Name, n, len(p.Versions))
}

// document writes a policy in the form in which it can be applied again.
func document(name, kind string, spec json.RawMessage) (string, error) {
	var v any
	if err := json.Unmarshal(spec, &v); err != nil {
		return "", fmt.Errorf("spec of policy %s: %w", name, err)
	}
	doc := struct {
		Kind string `yaml:"kind"`
		Name string `yaml:"name"`
		Type string `yaml:"type"`
		Spec any    `yaml:"spec"`
	}{"policy", name, kind, v}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(doc); err != nil {
		return "", err
	}
	return b.String(), e.Close()
}

// diff returns the lines of both texts, each after "-", "+" or " ", by the
// longest common subsequence. Policies are short: quadratic memory is bounded
// by cutting equal ends first.
func diff(oldText, newText string) []string {
	a := strings.Split(strings.TrimSuffix(oldText, "\n"), "\n")
	b := strings.Split(strings.TrimSuffix(newText, "\n"), "\n")
	var head, tail []string
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		head = append(head, " "+a[0])
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		tail = append([]string{" " + a[len(a)-1]}, tail...)
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	common := make([][]int, len(a)+1) // length of the common subsequence of a[i:] and b[j:]
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	middle := []string{}
	for i, j := 0, 0; i < len(a) || j < len(b); {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			middle = append(middle, " "+a[i])
			i, j = i+1, j+1
		case j == len(b) || (i < len(a) && common[i+1][j] >= common[i][j+1]):
			middle = append(middle, "-"+a[i])
			i++
		default:
			middle = append(middle, "+"+b[j])
			j++
		}
	}
	return append(append(head, middle...), tail...)
}

func (a *app) policyRollbackCommand() *cobra.Command {
	var in api.Rollback
	cmd := &cobra.Command{Use: "rollback NAME [--to N]", Short: "Make an older version the current one again", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printApplied, func(ctx context.Context, c *api.Client) (api.Applied, error) {
				return c.RollbackPolicy(ctx, args[0], in)
			})
		}}
	cmd.Flags().Int64Var(&in.To, "to", 0, "version (default: the one before the current)")
	return cmd
}

func (a *app) deploymentCommand() *cobra.Command {
	names := a.completeNames(1, namesOf((*api.Client).Deployments, func(d api.Deployment) string { return d.Name }))
	list := &cobra.Command{Use: "list", Short: "List deployments", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, deploymentTable), func(ctx context.Context, c *api.Client) ([]api.Deployment, error) { return c.Deployments(ctx) })
		}}
	var yes bool
	remove := &cobra.Command{Use: "delete NAME", Short: "Take a deployment's policies off its nodes", Args: cli.Exactly(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			d, err := c.DeploymentStatus(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if n := d.Counts.Applied + d.Counts.Failed + d.Counts.Pending + d.Counts.Offline; n > 1 {
				if err := cli.Confirm(a.streams, yes, "deployment %s goes from %d nodes", d.Name, n); err != nil {
					return err
				}
			}
			r, err := c.DeleteDeployment(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.printApplied(r)
		}}
	remove.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask when it is on several nodes")
	status := a.deploymentStatusCommand()
	status.ValidArgsFunction = names
	return cli.Group("deployment", "Deployments: which nodes get which policies",
		a.applyVerb("apply -f FILE|-", "Create and change the deployments of a file", "deployment"), list, status, remove)
}

func deploymentTable(all ...api.Deployment) cli.Table {
	t := cli.Table{Columns: []string{"name", "state", "reason", "revision", "selector", "policies", "applied", "pending", "failed", "offline"}}
	for _, d := range all {
		t.Add(d.Name, d.State, d.Reason, fmt.Sprint(d.Revision), d.Selector, strings.Join(d.Policies, ","),
			fmt.Sprint(d.Counts.Applied), fmt.Sprint(d.Counts.Pending), fmt.Sprint(d.Counts.Failed), fmt.Sprint(d.Counts.Offline))
	}
	return t
}

func (a *app) deploymentStatusCommand() *cobra.Command {
	var wait cli.DurationFlag
	var failed bool
	cmd := &cobra.Command{Use: "status NAME [--wait D] [--failed]", Short: "Show a deployment on each node", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			d, err := c.DeploymentStatus(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var waited error
			if wait.Duration > 0 {
				var all []api.DeploymentStatus
				all, waited = a.waitDeployments(cmd.Context(), c, []string{d.Name}, wait.Std())
				if len(all) > 0 {
					d = all[0]
				}
			}
			if failed {
				d.Nodes = failedOnly(d.Nodes)
			}
			t := cli.Table{Columns: []string{"node", "state", "policy", "error", "revision", "since"}}
			for _, n := range d.Nodes {
				t.Add(n.Node, n.State, n.Policy, n.Error, n.Revision.String(), cli.Time(n.Since))
			}
			if a.out.Format == cli.FormatTable {
				a.out.Say("%s is %s%s: %d applied, %d pending, %d failed, %d offline", d.Name, d.State, prefixed(", ", d.Reason),
					d.Counts.Applied, d.Counts.Pending, d.Counts.Failed, d.Counts.Offline)
			}
			if err := a.out.Print(d, t); err != nil {
				return err
			}
			return waited
		}}
	cmd.Flags().Var(&wait, "wait", "wait so long for the connected nodes")
	cmd.Flags().BoolVar(&failed, "failed", false, "only the nodes on which it failed")
	return cmd
}

func failedOnly(all []api.DeploymentNode) []api.DeploymentNode {
	out := []api.DeploymentNode{}
	for _, n := range all {
		if n.State == "failed" {
			out = append(out, n)
		}
	}
	return out
}
