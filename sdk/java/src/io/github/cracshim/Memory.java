package io.github.cracshim;

import com.sun.management.HotSpotDiagnosticMXBean;
import java.lang.management.ManagementFactory;

/** Makes the heap small before a dump: what is in it is in every clone's image. */
final class Memory {
    private Memory() {}

    /**
     * Collects, and gives free heap back to the system as far as the collector does that. Where the
     * heap may not shrink (-Xms, -XX:+DisableExplicitGC) it does not.
     */
    static void giveBack() {
        if (!Boolean.parseBoolean(System.getProperty("io.github.cracshim.gc", "true"))) {
            return;
        }
        try {
            Shrinker.collect();
        } catch (Throwable t) { // a JVM of another make, or without the module jdk.management
            System.gc();
        }
    }

    /** Apart, so that Memory can be loaded where these classes do not exist. */
    private static final class Shrinker {
        /**
         * A full collection resizes the heap by these two (percent of it that may be free). At
         * their defaults up to 70 % of what stays committed is garbage, and is dumped.
         */
        private static final String MIN = "MinHeapFreeRatio";
        private static final String MAX = "MaxHeapFreeRatio";

        /** The serial collector shrinks by 0, 10, 40 and 100 % of what it could, one collection after the other. */
        private static final int SERIAL_STEPS = 4;

        static void collect() {
            HotSpotDiagnosticMXBean vm = ManagementFactory.getPlatformMXBean(HotSpotDiagnosticMXBean.class);
            String min = vm.getVMOption(MIN).getValue();
            String max = vm.getVMOption(MAX).getValue();
            int steps = Boolean.parseBoolean(vm.getVMOption("UseSerialGC").getValue()) ? SERIAL_STEPS : 1;
            try {
                vm.setVMOption(MIN, "0"); // first: it may not exceed the other
                vm.setVMOption(MAX, "1");
                for (int i = 0; i < steps; i++) {
                    System.gc();
                }
            } finally {
                vm.setVMOption(MAX, max);
                vm.setVMOption(MIN, min);
            }
        }
    }
}
