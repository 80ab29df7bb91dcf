package runtime

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// CRIU's marks at the start of utsns-*.img (criu/include/magic.h).
const (
	criuCommonMagic = 0x54564319
	criuUTSMagic    = 0x54473203
)

// renameHost shows the dump in dir with another host name: an overlay with one
// file of its own, in own, which the caller removes after use. It is mounted
// nowhere, and gone with the last file that is open in it. A clone must not run for a moment under the name of the original,
// and the dump itself is not ours to change: others restore from it.
//
// Links in a directory would not do: CRIU opens some images after it has changed
// its root.
func renameHost(dir, own, host, domain string) (*os.File, error) {
	if err := os.Mkdir(own, 0o700); err != nil {
		return nil, err
	}
	images, err := filepath.Glob(filepath.Join(dir, "utsns-*.img"))
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		if err := os.WriteFile(filepath.Join(own, filepath.Base(image)), utsImage(host, domain), 0o600); err != nil {
			return nil, err
		}
	}
	return readOnlyOverlay(own, dir)
}

// readOnlyOverlay merges directories, the first on top.
func readOnlyOverlay(dirs ...string) (*os.File, error) {
	for i, dir := range dirs {
		dirs[i] = strings.NewReplacer(`\`, `\\`, `:`, `\:`).Replace(dir)
	}
	lower := strings.Join(dirs, ":")
	ctx, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetString(ctx, "lowerdir", lower); err != nil {
		return nil, fmt.Errorf("overlay of %s: %w", lower, err)
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("overlay of %s: %w", lower, err)
	}
	mnt, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return nil, os.NewSyscallError("fsmount overlay", err)
	}
	return os.NewFile(uintptr(mnt), "overlay:"+lower), nil
}

// utsImage is CRIU's image of a UTS namespace: the marks, the length of the one
// entry, and the entry (images/utsns.proto in CRIU's sources).
func utsImage(host, domain string) []byte {
	if domain == "" {
		domain = "(none)" // the kernel's own default; the field is required
	}
	var entry []byte
	entry = protowire.AppendTag(entry, 1, protowire.BytesType)
	entry = protowire.AppendString(entry, host)
	entry = protowire.AppendTag(entry, 2, protowire.BytesType)
	entry = protowire.AppendString(entry, domain)
	var image []byte
	image = binary.LittleEndian.AppendUint32(image, criuCommonMagic)
	image = binary.LittleEndian.AppendUint32(image, criuUTSMagic)
	image = binary.LittleEndian.AppendUint32(image, uint32(len(entry)))
	return append(image, entry...)
}
