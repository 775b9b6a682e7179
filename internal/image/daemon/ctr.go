package daemon

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/ctr/app"
)

// CTR is containerd's own command line, ctr; args[0] is its name. It returns
// the exit code. Where nothing else is said its snapshotter is that of volumes,
// since containerd's default, overlayfs, is not built in.
func CTR(ctx context.Context, args []string) int {
	const snapshotter = "CONTAINERD_SNAPSHOTTER"
	if os.Getenv(snapshotter) == "" {
		os.Setenv(snapshotter, "blockfile")
	}
	if err := app.New().Run(ctx, args); err != nil {
		fmt.Fprintf(os.Stderr, "ctr: %v\n", err)
		return 1
	}
	return 0
}
