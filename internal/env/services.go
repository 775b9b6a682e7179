package env

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/api/services/microvm/v1alpha1"
	"ingot/guest"
	images "ingot/internal/image/build"
)

// awaitHub waits until the hub answers, and has it set its rules again, which it
// does when it starts, if somebody took one away.
func (u *up) awaitHub(ctx context.Context) (string, error) {
	var err error
	if u.conns, err = u.env.Dial(); err != nil {
		return "", err
	}
	client, name := ingotv1.NewHubClient(u.conns.Hub), u.env.Hub().Name
	var facts *ingotv1.HubFacts
	ask := func(ctx context.Context) error {
		facts, err = client.Facts(ctx, &emptypb.Empty{}, grpc.WaitForReady(true))
		return err
	}
	if err := u.answers(ctx, name, ask); err != nil {
		return "", err
	}
	nat := facts.GetNat()
	if len(nat.GetMissing()) == 0 && nat.GetForwarding() {
		return "it answers, its rules are in force", nil
	}
	if err := u.lab.Restart(ctx, name, "hub"); err != nil {
		return "", err
	}
	return "it answers, its rules are set again", u.answers(ctx, name, ask)
}

// awaitHosts waits until all hosts answer.
func (u *up) awaitHosts(ctx context.Context) (string, error) {
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range u.env.Hosts() {
		client := v1alpha1.NewMicroVMClient(u.conns.Hosts[m.Name])
		group.Go(func() error {
			return u.answers(ctx, m.Name, func(ctx context.Context) error {
				_, err := client.ListMicroVMs(ctx, &v1alpha1.ListMicroVMsRequest{}, grpc.WaitForReady(true))
				return err
			})
		})
	}
	return "all answer", group.Wait()
}

// building are our images while they are being built.
type building struct {
	all    errgroup.Group
	cancel context.CancelFunc
	images [2]images.OCIImage // of builtImages
}

var builtImages = [2]string{"kernel", "busybox"}

// buildImages begins to build the images that the registry has not got, or has of
// another build, beside the steps until it is there to take them.
func (u *up) buildImages(ctx context.Context) (string, error) {
	init, err := guest.Init()
	if err != nil {
		return "", err
	}
	u.stamp = imageStamp(init)
	if b, err := os.ReadFile(u.pushedPath()); err == nil && bytes.Equal(b, u.stamp) {
		return strings.Join(builtImages[:], ", ") + " (not needed)", nil
	}
	u.build(ctx, init)
	return strings.Join(builtImages[:], ", ") + " (begun)", nil
}

func (u *up) build(ctx context.Context, init []byte) {
	b := &building{}
	ctx, b.cancel = context.WithCancel(ctx)
	o := images.Options{Progress: func(s string) { u.say("  %s", s) }}
	b.all.Go(func() (err error) {
		b.images[0], err = images.Kernel(ctx, o, init)
		return err
	})
	b.all.Go(func() (err error) {
		b.images[1], err = images.Busybox(ctx, o)
		return err
	})
	u.building = b
}

// end stops what is still being built.
func (b *building) end() {
	if b != nil {
		b.cancel()
		b.all.Wait()
	}
}

// pushedPath is a file that says which images the registry was given.
func (u *up) pushedPath() string { return filepath.Join(u.env.Dir(), "images") }

// provideImages pushes the images that were built. A registry that was to have
// them, and has not, gets them now.
func (u *up) provideImages(ctx context.Context) (string, error) {
	r := images.Registry{Address: u.env.RegistryAddress(), CAFile: u.env.CAFile(), User: "ingot", Password: string(u.token)}
	if u.building == nil {
		missing := false
		for _, name := range builtImages {
			there, err := images.Exists(ctx, r, name)
			if err != nil {
				return "", err
			}
			missing = missing || !there
		}
		if !missing {
			return strings.Join(builtImages[:], ", ") + " (there)", nil
		}
		init, err := guest.Init()
		if err != nil {
			return "", err
		}
		u.build(ctx, init)
	}
	if err := u.building.all.Wait(); err != nil {
		return "", err
	}
	var pushing errgroup.Group
	for i, name := range builtImages {
		pushing.Go(func() error {
			_, err := images.Push(ctx, r, name, u.building.images[i])
			return err
		})
	}
	if err := pushing.Wait(); err != nil {
		return "", err
	}
	return strings.Join(builtImages[:], ", ") + " (pushed)", writeFile(u.pushedPath(), u.stamp)
}

// imageStamp names what our images are made of, so that a new guest program makes
// new images.
func imageStamp(init []byte) []byte {
	return fmt.Appendf(nil, "%x\n", sha256.Sum256(init))
}
